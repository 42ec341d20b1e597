"""Sources, splits and batches: real digits, real archives written here, and every way they can be broken."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ebjdat import params
from ebjdat.data import prepared, sources
from ebjdat.data.batches import DeviceData, epoch_batches, generator, random_crop_flip
from ebjdat.data.prepared import Prepared
from ebjdat.data.sources import DataError
from ebjdat.params import AugmentSettings, DataSettings

from .conftest import ROOT

Files = dict[str, bytes]


def picture(value: int, size: int = 8, mode: str = "RGB") -> bytes:
    memory = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, 255 - value)).save(memory, "PNG")
    return memory.getvalue()


@pytest.fixture
def files() -> Files:
    """Three classes, 6 training and 2 test images each; every image has a colour of its own."""
    found = {}
    for k, label in enumerate(("ant", "bee", "cat")):
        for split, n in (("train", 6), ("test", 2)):
            for i in range(n):
                found[f"{split}/{label}/{i:02d}.png"] = picture(k * 50 + i + (20 if split == "test" else 0))
    return found


def as_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def as_tar(path: Path, files: Files, mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


KINDS: dict[str, Callable[[Path, Files], Path]] = {
    "folder": lambda tmp, files: as_folder(tmp / "images", files),
    "tar.xz": lambda tmp, files: as_tar(tmp / "images.tar.xz", files),
    "tar.gz": lambda tmp, files: as_tar(tmp / "images.tar.gz", files, "w:gz"),
    "zip": lambda tmp, files: as_zip(tmp / "images.zip", files),
}


def settings(path: Path, **more: object) -> DataSettings:
    return DataSettings.model_validate({"source": "folder", "path": str(path), "validation": 3, **more})


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_archives_give_the_same_data(kind: str, tmp_path: Path, files: Files) -> None:
    shuffled = dict(sorted(files.items(), key=lambda item: item[1]))
    data, card = prepared.prepare(settings(KINDS[kind](tmp_path, shuffled)))
    expected, _ = prepared.prepare(settings(KINDS["folder"](tmp_path / "other", files)))
    assert data.data_hash == expected.data_hash
    assert data.classes == ("ant", "bee", "cat")
    assert card["counts"] == {s: dict.fromkeys(("ant", "bee", "cat"), n) for s, n in (("train", 5), ("validation", 1), ("test", 2))}
    for split, offset in (("train", 0), ("test", 20)):
        images, labels = data.split(split)
        for image, label in zip(images, labels, strict=True):  # the red channel says which file it was
            assert image[0, 0, 0] - offset - 50 * label in range(6)
            assert image[2, 0, 0] == 255 - image[0, 0, 0]


def test_one_enclosing_folder_is_allowed(tmp_path: Path, files: Files) -> None:
    wrapped = {f"set/{name}": content for name, content in files.items()}
    assert sources.folder(settings(as_tar(tmp_path / "a.tar.gz", wrapped, "w:gz"))).classes == ("ant", "bee", "cat")


def test_grey_images_among_colour_become_colour(tmp_path: Path, files: Files) -> None:
    mixed = sources.folder(settings(as_zip(tmp_path / "a.zip", {**files, "train/ant/00.png": picture(9, mode="L")})))
    assert mixed.images.shape[1] == 3
    assert (mixed.images == 9).all((1, 2, 3)).sum() == 1


def test_grey_images_keep_one_channel(tmp_path: Path) -> None:
    files = {f"{s}/{c}/{i}.png": picture(i, mode="L") for s in ("train", "test") for c in "ab" for i in range(4)}
    assert sources.folder(settings(as_zip(tmp_path / "a.zip", files))).images.shape == (16, 1, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train/ant/00.png": picture(1, size=9)}, "is 9x9 RGB, others are 8x8 RGB"),
        ({"train/ant/00.png": b"no image"}, "'train/ant/00.png' is not a readable image"),
        ({"train/ant/00.png": picture(1)[:50]}, "'train/ant/00.png' is not a readable image"),
        ({"train/dog/00.png": picture(1)}, "no images in test/dog"),
        ({"test/ant/00.png": None, "test/ant/01.png": None}, "no images in test/ant"),
    ],
    ids=["size", "no-image", "cut-image", "class-without-test", "class-without-images"],
)
def test_bad_images_are_refused(kind: str, change: dict[str, bytes | None], expected: str, tmp_path: Path, files: Files) -> None:
    broken = {name: content for name, content in {**files, **change}.items() if content is not None}
    with pytest.raises(DataError, match=expected):
        sources.folder(settings(KINDS[kind](tmp_path, broken)))


@pytest.mark.parametrize("kind", ["tar.xz", "tar.gz", "zip"])
@pytest.mark.parametrize("name", ["../evil.png", "train/../../evil.png", "/etc/evil.png", "train\\..\\..\\evil.png"])
def test_members_that_leave_the_archive_are_refused(kind: str, name: str, tmp_path: Path, files: Files) -> None:
    with pytest.raises(DataError, match="leads out of the archive"):
        sources.folder(settings(KINDS[kind](tmp_path, {**files, name: picture(1)})))
    assert [p.name for p in tmp_path.iterdir()] == [f"images.{kind}"]


def test_links_are_refused(tmp_path: Path, files: Files) -> None:
    path = as_tar(tmp_path / "a.tar", files, "w")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("train/ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    path = path.rename(tmp_path / "a.tar.gz")  # tarfile reads by content
    with pytest.raises(DataError, match="link or special file"):
        sources.folder(settings(path))
    outside = as_folder(tmp_path / "images", files)
    (outside / "train/ant/link.png").symlink_to(path)
    with pytest.raises(DataError, match="leads out of the folder"):
        sources.folder(settings(outside))


@pytest.mark.parametrize("kind", ["tar.xz", "tar.gz", "zip"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_archives_are_refused(kind: str, keep: float, tmp_path: Path, files: Files) -> None:
    path = KINDS[kind](tmp_path, files)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="corrupt or truncated"):
        sources.folder(settings(path))


def test_corrupt_member_of_a_zip_is_refused(tmp_path: Path, files: Files) -> None:
    path = as_zip(tmp_path / "a.zip", files)
    content = bytearray(path.read_bytes())
    at = content.find(b"IDAT")
    content[at + 6] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.zip"):
        sources.folder(settings(path))


def test_unknown_paths_and_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or archive"):
        sources.folder(settings(tmp_path / "none.zip"))
    (tmp_path / "a.rar").write_bytes(b"x")
    with pytest.raises(DataError, match="a folder or an archive ending in"):
        sources.folder(settings(tmp_path / "a.rar"))
    with pytest.raises(DataError, match="has no train/<class>"):
        sources.folder(settings(as_folder(tmp_path / "flat", {"1.png": picture(1)})))
    with pytest.raises(DataError, match="is not train/<class>/<image>"):
        sources.folder(settings(as_zip(tmp_path / "deep.zip", {"train/a/b/c/1.png": picture(1)})))


def test_a_torchvision_set_with_a_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated archive lies there; torchvision sees its checksum and asks the network, which is not there."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"truncated")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"CIFAR10 is not \(whole\) under"):
        sources.cifar10(DataSettings(source="cifar10", root=str(tmp_path), validation=10))


def test_nothing_is_left_half_written(tmp_path: Path, files: Files) -> None:
    data, card = prepared.prepare(settings(as_folder(tmp_path / "images", files)))
    out = tmp_path / "out" / "data.npz"
    with pytest.raises(TypeError):
        prepared.save(data, {"not JSON": object()}, out, tmp_path / "out" / "card.json")
    assert sorted(p.name for p in out.parent.iterdir()) == ["data.npz"]  # whole, and no temporary file
    assert prepared.load(out).data_hash == data.data_hash
    out.write_bytes(out.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged prepared data"):
        prepared.load(out)
    with pytest.raises(DataError, match="run the prepare stage first"):
        prepared.load(tmp_path / "none.npz")
    assert card["sizes"] == {"train": 15, "validation": 3, "test": 6}


def test_digits_are_scikit_learns(digits: Prepared) -> None:
    """Every image is one of the bundled ones with its label, all are used once, and the range is [0, 1] in 1/16 steps."""
    bundled = {
        (image * 255 / 16).round().astype(np.uint8).tobytes(): int(y) for image, y in zip(*load_digits(return_X_y=True), strict=True)
    }
    found = [(image.tobytes(), int(y)) for image, y in zip(digits.images, digits.labels, strict=True)]
    assert all(bundled[image] == y for image, y in found)
    assert len(found) == 1797
    assert set(np.unique(digits.images)) == {round(v * 255 / 16) for v in range(17)}


def test_splits_are_disjoint_stratified_and_fixed(digits: Prepared) -> None:
    parts = [set(part.tolist()) for part in (digits.train, digits.validation, digits.test)]
    assert [len(p) for p in parts] == [1170, 130, 497]
    assert len(set.union(*parts)) == 1797
    shares = np.bincount(digits.labels) / len(digits.labels)
    for part in parts:
        counts = np.bincount(digits.labels[list(part)], minlength=10)
        assert np.abs(counts - shares * len(part)).max() <= 1.01  # as near as whole images allow
    again, _ = prepared.prepare(DataSettings(source="digits", test=497, validation=130))
    other, _ = prepared.prepare(DataSettings(source="digits", test=497, validation=130, split_seed=1))
    assert again.data_hash == digits.data_hash != other.data_hash


def test_limits_keep_classes_and_the_first_test_examples(digits: Prepared) -> None:
    small, _ = prepared.prepare(DataSettings(source="digits", test=497, validation=130, n_train=100, n_test=50))
    assert np.bincount(small.labels[small.train]).min() >= 9
    assert np.array_equal(small.split("test")[0], digits.split("test", 50)[0])
    nearly, _ = prepared.prepare(DataSettings(source="digits", test=497, validation=130, n_train=1165))
    assert len(nearly.train) == 1165
    for wrong, message in (
        ({"n_train": 5}, "n_train is 5; at least one"),
        ({"n_train": 1200}, "the training split has 1170"),
        ({"test": 5}, "test is 5"),
    ):
        with pytest.raises(DataError, match=message):
            prepared.prepare(DataSettings.model_validate({"source": "digits", "test": 497, "validation": 130, **wrong}))
    with pytest.raises(DataError, match="n_test is 600"):
        prepared.prepare(DataSettings(source="digits", test=497, validation=130, n_test=600))


def test_class_means(digits: Prepared) -> None:
    images, labels = digits.split("train")
    for k in range(10):
        slow = sum(image.astype(float) for image, y in zip(images, labels, strict=True) if y == k) / (255 * (labels == k).sum())
        assert np.abs(digits.class_mean[k] - slow).max() < 1e-6  # float32


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
    assert abs(noise.std() - 0.03) < 0.001  # 256 * 64 draws: standard error 0.0002
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
    profile = params.load(ROOT / "params/cifar10.yaml")
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
    assert float(labelled.std()) == pytest.approx(0.1, rel=0.03)  # 256 * 64 draws: standard error 0.6 %
    assert abs(float((labelled * density).mean())) < 5 * 0.1 * 0.03 / 128


def test_images_of_any_size_are_scaled_and_cropped_at_the_centre(tmp_path: Path) -> None:
    """A left half black, right half white 40x20 image: the centre square keeps the edge in its middle."""
    files = {}
    for split in ("train", "test"):
        for label in "ab":
            for i, (width, height) in enumerate(((40, 20), (20, 20), (30, 64), (16, 16))):
                array = np.zeros((height, width, 3), np.uint8)
                array[:, width // 2 :] = 255
                memory = io.BytesIO()
                Image.fromarray(array).save(memory, "PNG")
                files[f"{split}/{label}/{i}.png"] = memory.getvalue()
    path = as_zip(tmp_path / "a.zip", files)
    with pytest.raises(DataError, match=r"data\.size"):
        sources.folder(settings(path))
    images = sources.folder(settings(path, size=10)).images
    assert images.shape == (16, 3, 10, 10)
    assert (images[..., :4] < 30).all()
    assert (images[..., 6:] > 225).all()
