"""Batches: an epoch covers its split once, repeats exactly, and augments as stated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ebjdat.data.batches import Batch, DeviceData, Extra, epoch_batches, generator, random_crop_flip
from ebjdat.settings import AugmentSettings, Profile, TrainingSettings, load, merge

from ..conftest import ROOT


def test_batches_cover_an_epoch_once_and_repeat_exactly(train_data: DeviceData) -> None:
    plain = AugmentSettings(pad=0, noise=0.0)
    epochs = [[b.x for b in epoch_batches(train_data, 64, plain, seed, epoch)] for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    joined = [torch.cat(parts) for parts in epochs]
    assert torch.equal(joined[0], joined[1])
    assert not torch.equal(joined[0], joined[2])
    assert not torch.equal(joined[0], joined[3])
    assert len(joined[0]) == 1170 // 64 * 64
    everything = {x.numpy().tobytes() for x in train_data.internal()}
    assert all(x.numpy().tobytes() in everything for x in joined[0])
    assert joined[0].min() == -1
    assert joined[0].max() == 1


def test_density_images_get_noise_of_the_stated_size(train_data: DeviceData) -> None:
    batch = next(epoch_batches(train_data, 256, AugmentSettings(pad=0, noise=0.03), 0, 0))
    noise = batch.x_density - batch.x
    assert abs(noise.std() - 0.03) < 0.001  # 256 * 64 samples: standard error 0.0002
    assert abs(noise.mean()) < 0.001
    as_is = next(epoch_batches(train_data, 64, AugmentSettings(pad=0, noise=0.0, density="plain"), 0, 0))
    assert as_is.x_density is as_is.x  # nothing to undo, no second forward
    silent = next(epoch_batches(train_data, 64, AugmentSettings(pad=0, noise=0.0), 0, 0))
    assert silent.x_density is silent.x


def test_crops_match_a_slow_loop() -> None:
    """Every crop is one of the (2p+1)^2 windows of numpy's reflect padding, flipped or not; all shifts occur."""
    images = torch.arange(400 * 2 * 5 * 5).reshape(400, 2, 5, 5).remainder(251).byte()
    out = random_crop_flip(images, AugmentSettings(pad=2, flip=True), generator(torch.device("cpu"), "test"))
    seen = set()
    for image, result in zip(images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        found = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if np.array_equal(result, padded[:, top : top + 5, left : left + 5][:, :, :: -1 if flip else 1])
        ]
        assert found
        seen.update(found[:1])
    assert len({(t, left) for t, left, _ in seen}) == 25
    assert {flip for *_, flip in seen} == {False, True}


def test_sada_jem_sees_unaugmented_images_for_its_density_term_and_no_other(train_data: DeviceData) -> None:
    """With the settings that the method resolves to: p(x) images are the raw ones, p(y|x) images are cropped and flipped."""
    profile = load(ROOT / "params/cifar10.yaml")
    raw = {x.numpy().tobytes() for x in train_data.internal()}

    def share(experiment: str, which: str) -> float:
        augment = profile.training_settings(experiment).augment.model_copy(update={"noise": 0.0})
        batch = next(epoch_batches(train_data, 256, augment, 0, 0))
        return sum(x.numpy().tobytes() in raw for x in getattr(batch, which)) / 256

    sada = profile.training_settings("sadajem").augment
    assert (sada.density, sada.noise, sada.pad, sada.flip) == ("plain", 0.0, 4, True)
    assert share("sadajem", "x_density") == 1
    assert share("sadajem", "x") < 0.1
    assert share("jempp", "x_density") < 0.1
    batch = next(epoch_batches(train_data, 64, sada, 0, 0))
    order = [int((train_data.internal() == x).flatten(1).all(1).nonzero()[0]) for x in batch.x_density]
    assert torch.equal(train_data.labels[order], batch.y)  # the same images in the same order


@pytest.mark.parametrize("own", [None, 48])
def test_an_epoch_can_begin_at_any_step(train_data: DeviceData, own: int | None) -> None:
    whole = list(epoch_batches(train_data, 64, AugmentSettings(labelled_noise=0.1), 3, 5, own_density=own))
    rest = list(epoch_batches(train_data, 64, AugmentSettings(labelled_noise=0.1), 3, 5, first=7, own_density=own))
    assert len(rest) == len(whole) - 7
    for a, b in zip(whole[7:], rest, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.x_density, b.x_density)
        assert torch.equal(a.y, b.y)


def test_density_images_of_their_own_cover_the_split_pass_by_pass(train_data: DeviceData) -> None:
    """Passes of 1170 // 100 batches, whatever the labelled epochs (1170 // 64 batches) are; labelled images stay as they were."""
    plain = AugmentSettings(pad=0, noise=0.0)
    index = {x.numpy().tobytes(): i for i, x in enumerate(train_data.internal())}
    drawn, labelled = [], []
    for epoch in range(2):
        paired = epoch_batches(train_data, 64, plain, 0, epoch)
        for own, pair in zip(epoch_batches(train_data, 64, plain, 0, epoch, own_density=100), paired, strict=True):
            assert torch.equal(own.x, pair.x)
            assert len(own.x_density) == 100
            drawn.append([index[x.numpy().tobytes()] for x in own.x_density])
            labelled.append([index[x.numpy().tobytes()] for x in own.x])
    assert len(drawn) == 2 * (1170 // 64)
    for first in range(0, 33, 11):
        a_pass = [i for batch in drawn[first : first + 11] for i in batch]
        assert len(set(a_pass)) == 1100
    assert drawn[0] != drawn[11]
    shared = [len(set(a) & set(b)) for a, b in zip(drawn, labelled, strict=True)]
    assert sum(shared) / len(shared) == pytest.approx(64 * 100 / 1170, rel=0.3)  # no more than chance: 5.5 of 64


def test_noise_on_labelled_images_is_another_than_that_of_density_images(train_data: DeviceData) -> None:
    """Of the stated size each, independent; a setting that is 0 draws nothing, so that the rest stays as it was."""
    silent, noisy = (
        next(epoch_batches(train_data, 256, AugmentSettings(pad=0, noise=0.03, labelled_noise=size), 0, 0)) for size in (0.0, 0.1)
    )
    assert torch.equal(noisy.x_density, silent.x_density)
    labelled, density = noisy.x - silent.x, silent.x_density - silent.x
    assert float(labelled.std()) == pytest.approx(0.1, rel=0.03)  # 256 * 64 samples: standard error 0.6 %
    assert abs(float((labelled * density).mean())) < 5 * 0.1 * 0.03 / 128


PLAIN = AugmentSettings(pad=0, noise=0.0)


@pytest.fixture
def more(train_data: DeviceData, profile: Profile) -> tuple[DeviceData, TrainingSettings]:
    """50 images of noise, which no digit is, with labels of their own; and settings with a share of them."""
    data = copy.copy(train_data)
    data.images = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    data.labels = torch.arange(50) % 10
    settings = profile.training_settings("pgd_at").model_dump()
    return data, TrainingSettings.model_validate(merge(settings, {"batch_size": 64, "extra": {"share": 0.7}}))


def places(batch: Batch, data: DeviceData) -> list[int]:
    """Where each image of a batch is in the data; -1: nowhere."""
    index = {x.numpy().tobytes(): i for i, x in enumerate(data.internal())}
    return [index.get(x.numpy().tobytes(), -1) for x in batch.x]


def test_extra_images_take_their_share_of_each_batch(train_data: DeviceData, more: tuple[DeviceData, TrainingSettings]) -> None:
    """int(0.7 x 64) = 44 of each batch, drawn with replacement; of the split 20, none twice in an epoch; each with its own label."""
    data, settings = more
    extra = Extra.of(data, settings, 0)
    batches = list(epoch_batches(train_data, 64, PLAIN, 0, 0, extra=extra))
    assert len(batches) == 1170 // 64
    real, drawn = [], []
    for batch in batches:
        assert batch.x_density is batch.x
        own, others = places(batch, train_data), places(batch, data)
        assert sum(i >= 0 for i in own) == 20
        assert sum(i >= 0 for i in others) == 44
        for i, j, y in zip(own, others, batch.y.tolist(), strict=True):
            assert y == (train_data.labels[i] if i >= 0 else data.labels[j])
        real += [i for i in own if i >= 0]
        drawn.append([j for j in others if j >= 0])
        slices = [sum(i >= 0 for i in own[k : k + 16]) for k in range(0, 64, 16)]
        assert max(slices) < 16  # of one kind alone in no slice
    assert len(set(real)) == len(real) == 20 * 18
    assert len(set(drawn[0])) < 44  # with replacement: 44 of 50 without a repeat has a chance of 1e-13
    counts = np.bincount([j for of_batch in drawn for j in of_batch], minlength=50)
    assert counts.min() > 0  # 792 draws: each of 50 is missed with a chance of 1e-7
    assert counts.max() < 40  # a mean of 16, a standard deviation of 4
    first = [i for i in places(batches[0], train_data) if i >= 0]
    assert first != [i for i in places(next(epoch_batches(train_data, 64, PLAIN, 0, 1, extra=extra)), train_data) if i >= 0]


def test_an_epoch_with_extra_images_repeats_and_begins_anywhere(train_data: DeviceData, more: tuple[DeviceData, TrainingSettings]) -> None:
    extra, augment = Extra.of(*more, 0), AugmentSettings(pad=1)
    whole, rest, other = (
        list(epoch_batches(train_data, 64, augment, seed, 5, first=first, extra=extra)) for seed, first in ((3, 0), (3, 7), (4, 0))
    )
    assert len(rest) == len(whole) - 7
    assert all(torch.equal(a.x, b.x) and torch.equal(a.x_density, b.x_density) for a, b in zip(whole[7:], rest, strict=True))
    assert not torch.equal(whole[0].x, other[0].x)


def test_shuffled_labels_are_the_same_ones_on_other_extra_images(more: tuple[DeviceData, TrainingSettings]) -> None:
    data, settings = more
    shuffled = settings.model_copy(update={"extra": settings.extra.model_copy(update={"shuffled_labels": True})})
    wrong = Extra.of(data, shuffled, 0)
    assert torch.equal(wrong.labels.bincount(), data.labels.bincount())
    assert float((wrong.labels == data.labels).float().mean()) < 0.4  # chance is 0.1
    assert torch.equal(wrong.labels, Extra.of(data, shuffled, 0).labels)
    assert torch.equal(Extra.of(data, settings, 0).labels, data.labels)


def test_plain_density_images_are_the_unaugmented_ones_of_the_same_batch(
    train_data: DeviceData, more: tuple[DeviceData, TrainingSettings]
) -> None:
    data, settings = more
    augment = AugmentSettings(pad=1, noise=0.0, density="plain")
    batch = next(epoch_batches(train_data, 64, augment, 0, 0, extra=Extra.of(data, settings, 0)))
    as_it_is = Batch(batch.x_density, batch.x_density, batch.y)
    assert sum(i >= 0 for i in places(as_it_is, data)) == 44
    assert sum(i >= 0 for i in places(as_it_is, train_data)) == 20
