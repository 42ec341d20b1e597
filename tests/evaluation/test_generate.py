"""Fresh chains, and protocols of what is measured against what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import fidelity, generate
from ebjdat.evaluation.frechet import Features, frechet_distance
from ebjdat.evaluation.generate import Samples
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.chains import run_chain, strides
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import ChainSettings, GenerateSettings, ParamsError, Profile, load

from ..conftest import ROOT


def test_fresh_chains_are_deterministic_labelled_and_start_where_they_say(
    network: WideResNet, digits: Prepared, train_data: DeviceData
) -> None:
    pool = StartPool.of(train_data, torch.from_numpy(digits.class_mean))
    settings = GenerateSettings(n=45, steps=2, batch_size=20)
    (first, starts), (again, _) = (generate.fresh_chains(network, pool, ChainSettings(step_size=1e-6), settings) for _ in range(2))
    assert (first.images.int() - starts.images.int()).abs().max() <= 1  # such steps end where they start
    assert torch.equal(first.images, again.images)
    assert first.images.shape == (45, 1, 8, 8)
    assert first.labels.tolist() == [i % 10 for i in range(45)]
    distance = ((first.images.float()[:, None] / 127.5 - 1 - pool.mean[None]) ** 2).flatten(2).sum(2)
    assert (distance.argmin(1) == first.labels).float().mean() > 0.75
    other, _ = generate.fresh_chains(network, pool, ChainSettings(step_size=0.2), settings)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_a_walk_in_single_steps_is_the_same_walk(
    name: str, conditional: bool, network: WideResNet, train_data: DeviceData, rng: torch.Generator
) -> None:
    """Bit for bit: no sampler keeps anything from step to step but x and its noise."""
    spec = ChainSettings(sampler=name, conditional=conditional, steps=4, step_size=0.3, noise=0.05)
    x, y = train_data.internal(slice(12)), train_data.labels[:12]
    with frozen_parameters(network, "train"):
        end = run_chain(network, x, y, spec, rng)
        seen = list(strides(network, x, y, spec, torch.Generator().manual_seed(0)))
    assert len(seen) == 4
    assert torch.equal(seen[-1], end)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("conditional", [False, True])
def test_watched_chains_are_the_fresh_ones(conditional: bool, network: WideResNet, pool: StartPool) -> None:
    settings = GenerateSettings(n=50, steps=3, batch_size=20)
    chain = ChainSettings(sampler="sgld", noise=0.05, step_size=0.5)
    ends, starts = generate.fresh_chains(network, pool, chain, settings, conditional=conditional)
    frames, seen_at = generate.watched_chains(network, pool, chain, settings, conditional=conditional)
    assert frames.shape == (4, 20, 1, 8, 8)
    assert seen_at == [0, 1, 2, 3]
    assert torch.equal(frames[0], starts.images[:20])
    assert torch.equal(frames[-1], ends.images[:20])
    assert not torch.equal(frames[1], frames[2])


def test_of_a_long_chain_evenly_spaced_steps_are_kept(network: WideResNet, pool: StartPool) -> None:
    settings = GenerateSettings(n=10, steps=60)
    frames, seen_at = generate.watched_chains(network, pool, ChainSettings(step_size=0.1), settings)
    ends, _ = generate.fresh_chains(network, pool, ChainSettings(step_size=0.1), settings)
    assert len(frames) == len(seen_at) == 25
    assert (seen_at[0], seen_at[-1]) == (0, 60)
    assert set(np.diff(seen_at)) == {2, 3}
    assert torch.equal(frames[-1], ends.images)


def test_conditional_chains_share_their_starts_and_go_down_their_own_energy(network: WideResNet, pool: StartPool) -> None:
    settings = GenerateSettings(n=40, steps=20)
    free_chain, bound_chain = (ChainSettings(sampler="sgld", step_size=1.0, mode="eval", conditional=bound) for bound in (False, True))
    free, free_starts = generate.fresh_chains(network, pool, free_chain, settings)
    bound, bound_starts = generate.fresh_chains(network, pool, free_chain, settings, conditional=True)
    assert torch.equal(free_starts.images, bound_starts.images)
    assert torch.equal(free.images, generate.fresh_chains(network, pool, bound_chain, settings)[0].images)  # whatever training did

    def joint(of: Samples) -> Tensor:
        with torch.no_grad():
            return -network.eval()(of.images.float() / 127.5 - 1)[range(40), of.labels]

    assert (joint(bound) < joint(free)).float().mean() > 0.9


class Brightness(nn.Module):
    """Three classes by the mean of [0, 1] images; the farther from the borders, the surer."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return 30 * torch.stack([-mean, -(mean - 0.5).abs() - 0.1, mean - 1], 1)


def test_the_released_selection_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy((rng.uniform(0, 1, (83, 1, 1, 1)) * np.ones((1, 1, 4, 4)) * 255).astype(np.uint8))
    with torch.no_grad():
        p = Brightness()(images.float() / 255).softmax(1).numpy()
    expected: set[int] = set()
    for k in range(3):
        mine = sorted((i for i in range(83) if p[i].argmax() == k), key=lambda i: -p[i].max())
        assert len(mine) > 10
        expected |= set(mine[: int(len(mine) * 0.9)])
    found = generate.most_confident(Brightness(), images, 0.9, batch_size=20).tolist()
    assert len(found) == len(set(found)) == len(expected) < 0.9 * 83
    assert set(found) == expected


def test_protocols_say_what_is_measured_against_what(network: WideResNet, digits: Prepared, flat: np.ndarray) -> None:
    """Under pixels as features every number can be recomputed; each set differs, so that none stands for another."""
    features = Features(lambda images: images.numpy().reshape(len(images), -1) / 255.0, lambda seen: seen[:, 20:30] * 9)
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)

    def some(n: int, factor: float) -> Samples:
        return Samples((images[:n] * factor).byte(), labels[:n])

    samples = {"fresh": some(200, 0.9), "conditional": some(180, 0.8), "buffer": some(160, 0.7)}
    starts, real = some(200, 0.5), {"train": flat[digits.train], "all": flat}
    settings = GenerateSettings(n=200, steps=1, protocols={"whole_buffer": {"like": "released", "select": 1.0}})
    found = generate.measure(network, samples, starts, real, "reference", features, settings)

    train = flat[digits.train]
    for suffix, name in (("", "fresh"), ("_conditional", "conditional"), ("_buffer", "buffer")):
        expected = fidelity.compare(features(samples[name].images), train, "reference", features)
        assert {key: found[f"{key}{suffix}"] for key in expected} == expected
    assert found["frechet_start"] == frechet_distance(features(starts.images), train)
    assert (found["n_samples"], found["n_conditional"], found["n_buffer"], found["n_reference"]) == (200, 180, 160, 1170)
    assert (found["frechet_against"], found["frechet_extractor"]) == ("train", "reference")

    class OfUnit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x * 2 - 1)

    kept = generate.most_confident(OfUnit(), samples["buffer"].images, 0.9, 50)
    released = features(samples["buffer"].images[kept])
    assert found["released_n_samples"] == len(kept) < 160
    assert found["released_n_reference"] == 1797
    assert found["released_frechet_against"] == "all"
    assert found["released_frechet"] == frechet_distance(released, flat)
    assert found["released_precision"] == fidelity.precision_recall(released, flat)[0]
    assert found["whole_buffer_n_samples"] == 160
    assert found["whole_buffer_frechet"] == frechet_distance(features(samples["buffer"].images), flat)
    assert len({found[key] for key in found if "frechet" in key and isinstance(found[key], float)}) == 6

    without = generate.measure(network, {**samples, "buffer": None}, starts, real, "reference", features, settings)
    assert {key for key in found if key.startswith("released_") or key.endswith("_buffer")} <= without.keys()
    assert {value for key, value in without.items() if key.startswith(("released_", "whole_buffer_"))} == {None}
    assert {value for key, value in without.items() if key.endswith("_buffer") and key != "n_buffer"} == {None}
    assert without["n_buffer"] == 0
    assert without["frechet"] == found["frechet"]
    with torch.no_grad():
        agree = (network(samples["conditional"].images.float() / 127.5 - 1).argmax(1) == samples["conditional"].labels).float().mean()
    assert found["class_agreement_conditional"] == pytest.approx(float(agree))


def profile_problems(**generate_settings: Any) -> str:
    with pytest.raises(ParamsError) as error:
        load(ROOT / "params/digits.yaml", [f"evaluation.generate.{k}={v}" for k, v in generate_settings.items()])
    return str(error.value)


def test_protocols_of_samples_are_data(profile: Profile) -> None:
    assert {k: v.model_dump(exclude={"like"}) for k, v in profile.evaluation.generate.protocols.items()} == {
        "standard": {"source": "fresh", "select": 1.0, "against": "train"},
        "released": {"source": "buffer", "select": 0.9, "against": "all"},
    }
    own = load(
        ROOT / "params/digits.yaml", ["evaluation.generate.protocols={released: null, bound: {like: standard, source: conditional}}"]
    ).evaluation.generate.protocols
    assert list(own) == ["standard", "bound"]
    assert (own["bound"].source, own["bound"].select, own["bound"].against) == ("conditional", 1.0, "train")
    same = load(ROOT / "params/digits.yaml", ["evaluation.generate.protocols.released.like=released"])
    assert same.evaluation.generate.protocols["released"].select == 0.9


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        ("{released: {select: 0.5}}", "protocols.released: its name fixes its values; add a protocol `like: released`"),
        ("{standard: {against: all}}", "protocols.standard: its name fixes its values"),
        ("{standard: null}", "'standard' is missing; it is always reported"),
        ("{mine: {source: buffer}}", "'mine' needs `like`, the preset it starts from; allowed: standard, released"),
        ("{mine: {like: releasd}}", "`like` 'releasd' is unknown; did you mean 'released'?"),
        ("{ema: {like: released, select: 0.5}}", "prefix ema_ is reserved for averaged weights"),
        ("{mine: {like: released, select: 0}}", "protocols.mine.select: input should be greater than 0"),
        ("{mine: {like: released, slect: 0.5}}", "unknown key; did you mean 'select'?"),
        ("{Mine: {like: released}}", "should match pattern"),
        ("{mine: 3}", "protocols.mine"),
        ("[released]", "valid mapping"),
    ],
)
def test_impossible_protocols_of_samples(protocols: str, expected: str) -> None:
    assert expected in profile_problems(protocols=protocols)
