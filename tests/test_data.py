"""Sources, splits and batches: real digits, real archives written here, and every way they can be broken."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import socket
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import ebjdat.files
from ebjdat import settings as params
from ebjdat.data import external, members, prepared, sources
from ebjdat.data.batches import DeviceData, epoch_batches, generator, random_crop_flip
from ebjdat.data.prepared import Prepared
from ebjdat.errors import DataError
from ebjdat.files import arrays_of
from ebjdat.settings import AugmentSettings, DataSettings
from ebjdat.stages import prepare

from .conftest import ROOT
from .test_images import deep_colours

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
        ({"test": 5}, "test is 5: allowed are 10 .one per digit. to 1787"),
        ({"test": 1790, "validation": 6}, "test is 1790: allowed are 10 .one per digit. to 1787"),
        ({"test": 1787, "validation": 9}, "at least 2 training images per class"),
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
    assert float(labelled.std()) == pytest.approx(0.1, rel=0.03)  # 256 * 64 samples: standard error 0.6 %
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


# One reader for folders and archives


BESIDE = {  # what lies beside images: left out without a word
    **{f"{place}Thumbs.db": b"x" for place in ("", "train/", "train/ant/")},
    **dict.fromkeys((".DS_Store", "train/.DS_Store", "train/ant/._00.png", "README.md", "train/LICENSE", "test/bee/desktop.ini"), b"x"),
    **dict.fromkeys(("__MACOSX/train/ant/._00.png", "train/@eaDir/00.png", ".git/config", "train/ant/@eaDir/00.png/x.jpg"), b"x"),
}
SKIPPED = {  # and what is counted
    **{f"train/ant/{i}.avif": b"x" for i in range(3)},
    **dict.fromkeys(("train/labels.csv", "train/bee/notes/why.csv", "test/cat/noname", "val/ant/00.png", "cover.png"), b"x"),
}
COUNTED = {
    ".avif": {"n": 3, "example": "train/ant/0.avif"},
    ".csv": {"n": 2, "example": "train/labels.csv"},
    "no suffix": {"n": 1, "example": "test/cat/noname"},
    "outside train/ and test/": {"n": 2, "example": "cover.png"},
}


@pytest.mark.parametrize("enclosing", ["", "set/"])
@pytest.mark.parametrize("kind", [*KINDS, "tar", "tar.bz2"])
def test_every_file_is_read_counted_or_known_junk(kind: str, enclosing: str, tmp_path: Path, files: Files) -> None:
    """The same tree gives the same data and the same counts, whatever holds it."""
    more = {"tar": "w", "tar.bz2": "w:bz2"}
    tree = {f"{enclosing}{name}": content for name, content in {**files, **BESIDE, **SKIPPED}.items()}
    path = as_tar(tmp_path / f"images.{kind}", tree, more[kind]) if kind in more else KINDS[kind](tmp_path, tree)
    data, card = prepared.prepare(settings(path))
    plain, plain_card = prepared.prepare(settings(as_folder(tmp_path / "plain", files)))
    assert data.data_hash == plain.data_hash
    assert (plain_card["reading"]["skipped"], plain_card["warnings"], plain_card["notes"]) == ({}, [], [])
    found = card["reading"]["skipped"]
    assert {name: kind["n"] for name, kind in found.items()} == {name: kind["n"] for name, kind in COUNTED.items()}
    assert found[".avif"]["example"].startswith(f"{enclosing}train/ant/")
    (warning,) = card["warnings"]
    assert warning.startswith(f"skipped 8 files: 3 .avif ('{enclosing}train/ant/")


def test_classes_that_look_alike_are_said(tmp_path: Path, files: Files) -> None:
    names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("Ant", "c at") for i in range(3)]
    more = {name: picture(200 + i) for i, name in enumerate(names)}
    _, card = prepared.prepare(settings(as_zip(tmp_path / "a.zip", {**files, **more}), validation=5))
    assert "classes that differ in case or spaces alone: 'Ant', 'ant', 'c at', 'cat'" in card["warnings"]
    assert len(card["classes"]) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_is_left_out_without_a_word(kind: str, tmp_path: Path, files: Files) -> None:
    """Names of papers before a number are images; classes that look like junk are said; what lies in real junk is not."""
    names = ("license.0.png", "notice.12.png", "README.photo.jpeg", "authors.1.2.png", "license.png")
    images = {f"train/ant/{name}": picture(200 + i) for i, name in enumerate(names)}
    said = {f"{split}/{folder}/{i}.png": picture(i) for split in ("train", "test") for folder in ("CVS", ".net") for i in range(2)}
    said |= {"train/ant/.hidden.png": picture(1), ".cache/1.jpg": picture(1), "train/bee/__pycache__/deep/1.PNG": picture(1)}
    junk = {name: picture(1) for name in (".git/1.png", "__MACOSX/train/ant/x.png", "train/bee/@eaDir/1.png", "train/bee/._1.png")}
    junk |= dict.fromkeys(("train/CVS/Root", "train/ant/.gitkeep", "train/ant/LICENSE.0.md", ".cache/train/x", "authors"), b"x")
    path = KINDS[kind](tmp_path, {**files, **images, **said, **junk})
    raw = sources.folder(settings(path))
    assert raw.classes == ("ant", "bee", "cat")
    assert len(raw.images) == 24 + len(images)
    skipped = raw.reading["skipped"]
    assert {kind: found["n"] for kind, found in skipped.items()} == {"in a folder that is ignored": 10, "whose name begins with a dot": 1}
    assert sources.said_of_skipped(skipped).startswith("skipped 11 files: 10 in a folder that is ignored ('")


def test_an_ignored_folder_is_no_reason_to_refuse(tmp_path: Path, files: Files) -> None:
    path = as_folder(tmp_path / "images", {**files, "train/.here/1.png": picture(1)})
    (path / "train/.loop").symlink_to(path)
    (path / "train/.there").symlink_to(tmp_path)
    (path / "train/.here/nowhere").symlink_to("none")
    os.mkfifo(path / "train/.here/x.png")
    raw = sources.folder(settings(path))
    assert raw.reading["skipped"]["in a folder that is ignored"]["n"] == 2
    assert len(raw.images) == 24


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "JPG", "ppm", "pgm", "pbm", "pnm", "gif", "webp", "Tif"])
def test_images_of_every_suffix_are_read(suffix: str, tmp_path: Path, files: Files) -> None:
    """Half of the images have it; the format is that of the content."""
    renamed = {(name[:-3] + suffix if name < "train/bee" else name): content for name, content in files.items()}
    assert sources.folder(settings(as_zip(tmp_path / "a.zip", renamed))).images.shape == (24, 3, 8, 8)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/ant/deeper/1.png", "is not train/<class>/<image>"),
        ("train/1.png", "'train/1.png' is not train/<class>/<image>"),
        ("Train/ant/1.png", "two folders are the train split"),
        ("more/train/ant/1.png", "two folders are the train split"),
        ("train/a\x1b[31mnt/1.png", r"a class name is printable text of at most 255 bytes; rename the folder 'a\\x1b\[31mnt'"),
        ("train/a\nnt/1.png", r"rename the folder 'a\\nnt'"),
        ("train/\u202eant/1.png", "printable"),
    ],
)
def test_images_in_a_wrong_place_are_refused_everywhere(kind: str, name: str, expected: str, tmp_path: Path, files: Files) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        sources.folder(settings(KINDS[kind](tmp_path, {**files, name: picture(1)})))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_cases_of_the_split_folders_are_read_and_said(tmp_path: Path, files: Files) -> None:
    renamed = {name.replace("train/", "Training set/TRAIN/"): content for name, content in files.items()}
    data, card = prepared.prepare(settings(as_zip(tmp_path / "a.zip", renamed)))
    assert card["notes"] == ["the folder 'Training set/TRAIN' is the train split"]
    assert data.data_hash == prepared.prepare(settings(as_zip(tmp_path / "b.zip", files)))[0].data_hash


def test_one_class_name_in_two_forms_of_unicode_is_one_class(tmp_path: Path, files: Files) -> None:
    renamed = {n.replace("test/ant", "test/e\u0301").replace("train/ant", "train/\u00e9"): c for n, c in files.items()}
    assert sources.folder(settings(as_zip(tmp_path / "a.zip", renamed))).classes == ("bee", "cat", "\u00e9")


def special(kind: str, path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
            server.bind(path.name)
    elif kind == "not-utf8":
        path.with_name(os.fsdecode(b"\xff.png")).write_bytes(picture(1))
    elif kind == "loop of folders":
        path.unlink(missing_ok=True)
        path.symlink_to(path.parents[2])
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "none.png", "loop": path.name, "outside": __file__}[kind])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fifo", "is a FIFO; only folders and files are allowed"),
        ("socket", "is a socket; only"),
        ("device", "is a device; only"),
        ("nowhere", "is a link that leads nowhere"),
        ("loop", "is a link that leads nowhere"),
        ("loop of folders", "is a link to a folder that it lies in"),
        ("not-utf8", "has a name that is not UTF-8"),
    ],
)
@pytest.mark.parametrize("follow", [False, True])
def test_what_is_no_file_is_refused_and_never_waited_for(kind: str, expected: str, follow: bool, tmp_path: Path, files: Files) -> None:
    path = as_folder(tmp_path / "images", files)
    special(kind, path / "train/ant/x.png")
    with pytest.raises(DataError, match=expected):
        sources.folder(settings(path, follow_links=follow))


def test_links_are_followed_where_the_settings_say_so_or_into_the_dvc_cache(
    tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sources.folder(settings(as_folder(tmp_path / "plain", files))).images

    def linked(name: str, store: Path) -> Path:
        store.mkdir(parents=True)
        for i, (file, content) in enumerate(files.items()):
            (store / str(i)).write_bytes(content)
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).symlink_to(store / str(i))
        return tmp_path / name

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n[cache]\n    dir = ../store\n    type = symlink\n"
    )
    monkeypatch.chdir(tmp_path)
    members.dvc_cache.cache_clear()
    assert np.array_equal(sources.folder(settings(linked("cached", tmp_path / "store/files/md5/00"))).images, expected)
    elsewhere = linked("linked", tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"is a link that leads out of the folder, and not into DVC's cache; data\.follow_links: true"):
        sources.folder(settings(elsewhere))
    assert np.array_equal(sources.folder(settings(elsewhere, follow_links=True)).images, expected)
    members.dvc_cache.cache_clear()


def test_folders_and_files_that_may_not_be_read_are_refused(files: Files) -> None:
    """As another user where the tests are run by root, who may read everything."""
    with tempfile.TemporaryDirectory() as place:
        path = as_folder(Path(place) / "images", files)
        os.chmod(place, 0o755)
        user = os.geteuid()
        for name, expected in (
            ("train/ant/00.png", "'train/ant/00.png' cannot be read .Permission denied"),
            ("train/ant", "the folder 'train/ant'"),
        ):
            (path / name).chmod(0)
            try:
                if user == 0:
                    os.seteuid(65534)
                with pytest.raises(DataError, match=expected):
                    sources.folder(settings(path))
            finally:
                os.seteuid(user)
                (path / name).chmod(0o755)


@pytest.mark.parametrize("path", ["x" * 5000, "nul\0byte", "none"])
def test_paths_that_cannot_be_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="there is no such folder or archive"):
        sources.folder(DataSettings(source="folder", path="x", validation=3).model_copy(update={"path": path}))


# Bombs and damage


@contextlib.contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Bytes that Python's allocators hand out meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def lying_zip(path: Path, files: Files, method: int, size: int) -> Path:
    """The last member unpacks to `size` bytes and states 1000."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("train/ant/last.png", bytes(size))
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", size), struct.pack("<L", 1000)))
    return path


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (zipfile.ZIP_DEFLATED, "corrupt or truncated"),
        (zipfile.ZIP_BZIP2, "is compressed by method 12; stored and deflate are allowed"),
        (zipfile.ZIP_LZMA, "is compressed by method 14; stored"),
    ],
)
def test_a_zip_member_that_lies_about_its_size_takes_no_memory(method: int, expected: str, tmp_path: Path, files: Files) -> None:
    path = lying_zip(tmp_path / "a.zip", files, method, 16_000_000)
    with peak_below(4_000_000), pytest.raises(DataError, match=expected):
        sources.folder(settings(path))


def header(kind: bytes, size: int, name: str = "train/ant/x") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(records: bytes) -> bytes:
    return header(tarfile.XHDTYPE, len(records)) + padded(records)


DIGITS = b"1000000 comment=" + b"1" * 999_983 + b"\n"  # tarfile looks at each of them from each of them
RECORD = header(tarfile.XHDTYPE, 17) + padded(b"17 comment=aaaaa\n")
LONG = 3_000_000
LONG_NAME = header(tarfile.GNUTYPE_LONGNAME, 1500) + padded(b"a" * 1500)
BROKEN_TARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {  # what becomes of a tar (its end mark cut off)
    "long name": (
        lambda tar: tar + header(tarfile.GNUTYPE_LONGNAME, LONG) + bytes(LONG),
        "bytes of names and headers than are",
    ),
    "pax": (lambda tar: tar + header(tarfile.XHDTYPE, LONG) + bytes(LONG), "bytes of names and headers than are"),
    "first pax": (lambda tar: header(tarfile.XGLTYPE, LONG) + bytes(LONG), "bytes of names and headers than are"),
    "terabytes": (lambda tar: tar + header(b"0", 2**33 - 1, "train/ant/x.txt") * 3 + bytes(512), "unexpected end"),
    "more than the limit": (lambda tar: tar + header(b"0", 2**35, "notes.txt") + bytes(1024), "unpacks to more than"),
    "records without end": (lambda tar: tar + RECORD * 900 + bytes(1024), "corrupt or truncated"),
    "a record of digits": (lambda tar: tar + pax(DIGITS) + bytes(1024), "corrupt or truncated"),
    "overlapping records": (lambda tar: tar + pax(b"2 " * 500_000 + b"=\n") + bytes(1024), "a pax record is broken"),
    "a record before it begins": (lambda tar: tar + pax(b"2 comment=a\n") + bytes(1024), "a pax record is broken"),
    "negative name": (lambda tar: tar + negative(header(tarfile.GNUTYPE_LONGNAME, 0)) + bytes(1024), "a size is negative"),
    "sparse by a record": (lambda tar: tar + pax(b"25 GNU.sparse.major=1.00\n") + header(b"0", 0) + bytes(1024), "as a sparse file"),
    "sparse": (lambda tar: tar + header(tarfile.GNUTYPE_SPARSE, 0) + bytes(1024), "packed as a sparse file"),
    "fifo": (lambda tar: tar + header(tarfile.FIFOTYPE, 0) + bytes(1024), "is a link or special file"),
    "no end mark": (lambda tar: tar, "its end mark is missing"),
    "broken header": (lambda tar: tar[:1024] + tar[1024:].replace(b"train", b"tra1n", 1) + bytes(1024), "a header is broken"),
    "a tar behind a tar": (lambda tar: tar + bytes(1024) + tar + bytes(1024), "more follows after its end mark"),
    "twice": (lambda tar: tar + tar[:1024] + bytes(1024), "has two members"),
    "long path": (
        lambda tar: tar + header(tarfile.GNUTYPE_LONGNAME, 1500) + padded(b"a" * 1500) + header(b"0", 0) + bytes(1024),
        "characters; at",
    ),
    "negative size": (lambda tar: tar + negative(header(b"0", 0)) + bytes(1024), "corrupt or truncated"),
}


def negative(block: bytes) -> bytes:
    """A member of -1024 bytes, in base 256: a reader that believes it goes back and never ends."""
    block = block[:124] + (-1024).to_bytes(12, "big", signed=True) + b" " * 12 + block[148:]
    block = block[:136] + b"0" * 11 + b"\0" + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["tar", "gz", "xz"])
@pytest.mark.parametrize("kind", BROKEN_TARS)
def test_broken_and_swollen_tars_are_refused(kind: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    small = {f"{s}/{c}/{i}.png": picture(i) for s in ("train", "test") for c in ("ant", "bee") for i in range(4)}
    whole = as_tar(tmp_path / "whole.tar", small, "w").read_bytes()
    change, expected = BROKEN_TARS[kind]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(compress(change(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))))
    with peak_below(20_000_000), pytest.raises(DataError, match=expected) as caught:
        sources.folder(settings(path))
    assert "\n" not in str(caught.value)


def test_streams_are_bounded_in_all_and_in_what_decoding_takes(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_tar(tmp_path / "a.tar", files, "w")
    plain, tail = path.read_bytes(), bytes(3_000_000)
    for name, compress in (("a.tar.gz", gzip.compress), ("a.tar.xz", lzma.compress), ("a.tar.bz2", bz2.compress)):
        several = tmp_path / name
        several.write_bytes(compress(plain) + compress(tail) + compress(tail))  # streams one after another are one
        assert sources.folder(settings(several)).images.shape == (24, 3, 8, 8)
        with monkeypatch.context() as limits:
            limits.setattr(members, "STREAM_LIMIT", 5_000_000)
            with pytest.raises(DataError, match="unpacks to more than 5,000,000 bytes"):
                sources.folder(settings(several))
        with monkeypatch.context() as limits:
            limits.setattr(members, "SWOLLEN", 3_000_000)
            with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
                sources.folder(settings(several))
    with monkeypatch.context() as limits:
        limits.setattr(members, "SWOLLEN", 0)
        assert sources.folder(settings(path)).images.shape == (24, 3, 8, 8)
    with monkeypatch.context() as limits:
        limits.setattr(members, "HEADERS_LIMIT", 12_000)
        with pytest.raises(DataError, match=r"headers than are allowed, 1,048,576 for a member and 12,000 in all"):
            sources.folder(settings(path))
    path.write_bytes(pax(b"6 a=b\n" * 30 + DIGITS) + plain)
    assert sources.folder(settings(path)).images.shape == (24, 3, 8, 8)
    with monkeypatch.context() as limits:
        limits.setattr(members, "RECORDS_LIMIT", 30)
        with pytest.raises(DataError, match="has more than 30 pax records"):
            sources.folder(settings(path))
    path.write_bytes(RECORD * 25 + plain)
    with monkeypatch.context() as limits:
        limits.setattr(members, "COUNT_LIMIT", 24)
        with pytest.raises(DataError, match="has more than 24 headers of names and records"):
            sources.folder(settings(path))
    with monkeypatch.context() as limits:
        limits.setattr(members, "XZ_MEMORY", 2**20)
        with pytest.raises(DataError, match=r"a\.tar\.xz: the archive is corrupt or truncated .*emory"):
            sources.folder(settings(tmp_path / "a.tar.xz"))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_form_are_read(form: int, tmp_path: Path, files: Files) -> None:
    """Long names, names in UTF-8 and Latin-1, times in fractions, sizes and comments in pax records."""
    more = {f"train/\u00e9/{'x' * 90}{i}.png": picture(i) for i in range(4)} | {f"test/\u00e9/{i}.png": picture(90 + i) for i in range(2)}
    records = {"comment": "9" * 5000, "LIBARCHIVE.xattr.user.x": "a=b\nc"}
    with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers={"comment": "all"}) as archive:
        for name, content in {**files, **more}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            member.pax_headers = {**records, "size": str(len(content))} if form == tarfile.PAX_FORMAT else {}
            archive.addfile(member, io.BytesIO(content))
    raw = sources.folder(settings(tmp_path / "a.tar"))
    assert raw.classes == ("ant", "bee", "cat", "\u00e9")
    assert np.array_equal(raw.images, sources.folder(settings(as_folder(tmp_path / "images", {**files, **more}))).images)


def test_numbers_and_sizes_of_files_are_bounded(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_folder(tmp_path / "images", files)
    for name, value, place, expected in (
        ("COUNT_LIMIT", 20, members, "has more than 20 files and folders"),
        ("FILE_LIMIT", 50, sources, "bytes; at most 50 are allowed"),
        ("DATA_LIMIT", 1000, sources, "images take more than 1,000 bytes"),
    ):
        with monkeypatch.context() as limits:
            limits.setattr(place, name, value)
            with pytest.raises(DataError, match=expected):
                sources.folder(settings(path))
    with (path / "train/ant/notes.txt").open("wb") as file:
        file.truncate(2**40)  # a sparse file of a terabyte, no image: counted, not read
    assert sources.folder(settings(path)).reading["skipped"][".txt"]["n"] == 1
    monkeypatch.setattr(ebjdat.files.ZipSource.__init__, "__defaults__", (500,))  # its limit
    with pytest.raises(DataError, match=r"the list of its members has more than 500 bytes"):
        sources.folder(settings(as_zip(tmp_path / "a.zip", files)))


def test_encrypted_zips_are_refused(tmp_path: Path, files: Files) -> None:
    path = as_zip(tmp_path / "a.zip", files)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'train/ant/00\.png' is encrypted"):
        sources.folder(settings(path))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "zip"])
def test_damaged_archives_are_read_whole_or_refused(kind: str, tmp_path: Path, files: Files) -> None:
    """Random bytes are changed: nothing but DataError comes out, and no image is dropped without a word."""
    path = as_tar(tmp_path / "a.tar", files, "w") if kind == "tar" else KINDS[kind](tmp_path, files)
    content, rng = path.read_bytes(), np.random.default_rng(3)
    for _ in range(30):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with contextlib.suppress(DataError):
            raw = sources.folder(settings(path))
            assert len(raw.images) + sum(kind["n"] for kind in raw.reading["skipped"].values()) == 24


# Labels, ranges and duplicates


def test_folders_named_by_numbers_are_in_numeric_order_and_said(tmp_path: Path) -> None:
    files = {f"{s}/{c}/{i}.png": picture(c, mode="L") for s in ("train", "test") for c in range(12) for i in range(3)}
    path = as_zip(tmp_path / "a.zip", files)
    data, card = prepared.prepare(settings(path, validation=12))
    assert data.classes == tuple(map(str, range(12)))
    assert (data.images[:, 0, 0, 0] == data.labels).all()
    assert card["reading"]["class_order"] == "numeric"
    assert "classes are in numeric order (0, 1, 2, ...), not sorted as text" in card["notes"]
    (in_order,) = external.images_of(path).notes
    assert in_order == "classes are in numeric order (0, 1, 2, ...), not sorted as text"
    assert external.images_of(path, classes=tuple(map(str, range(12)))).notes == ()
    named = {name.replace("/11/", "/eleven/"): content for name, content in files.items()}
    assert sources.folder(settings(as_zip(tmp_path / "b.zip", named))).classes == (*sorted(map(str, range(11))), "eleven")
    text = sorted(map(str, range(12)))
    given = sources.folder(settings(path, classes=text))
    assert given.classes == tuple(text)
    assert (given.images[:, 0, 0, 0] == np.array([int(c) for c in text])[given.labels]).all()
    for wrong, expected in (([*text, "12"], "without a folder '12'"), (text[1:], "not given '0'"), ([*text, "0"], "named once")):
        with pytest.raises(DataError, match=expected):
            sources.folder(settings(path, classes=wrong))


def test_images_divided_by_255_are_refused(tmp_path: Path) -> None:
    masks = {f"{s}/{c}/{i}.png": picture(i % 2, mode="L") for s in ("train", "test") for c in "ab" for i in range(4)}
    with pytest.raises(DataError, match=r"a\.zip, training images: no pixel is above 1; pixels in 0\.\.255 are needed\. Were they"):
        prepared.prepare(settings(as_zip(tmp_path / "a.zip", masks)))
    half = {name: picture(200, mode="L") if name.startswith("train") else content for name, content in masks.items()}
    path = as_folder(tmp_path / "half", half)
    with pytest.raises(DataError, match=r"half, test images: no pixel is above 1"):
        prepared.prepare(settings(path))
    for size in (None, 8):
        with pytest.raises(DataError, match="half: no pixel is above 1"):
            external.images_of(path, size)


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [("a\nb", None, r"'a\\nb': path: printable"), ("a", 4, "'a': size: .* equal to 8"), ("x" * 5000, None, "path: .* at most 4096 char")],
)
def test_paths_and_sizes_that_no_settings_allow_are_one_line(path: str, size: int | None, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        external.images_of(Path(path), size)
    assert "\n" not in str(caught.value)


def test_class_names_are_compared_in_one_form_of_unicode(tmp_path: Path, files: Files) -> None:
    path = as_zip(tmp_path / "a.zip", {n.replace("/ant/", "/cafe\u0301/"): c for n, c in files.items()})
    for name in ("caf\u00e9", "cafe\u0301"):
        raw = sources.folder(settings(path, classes=["cat", name, "bee"]))
        assert raw.classes == ("cat", "caf\u00e9", "bee")
        assert (raw.images[:, 0, 0, 0] // 50 == np.array([2, 0, 1])[raw.labels]).mean() == 1
        (tmp_path / "names.txt").write_text(f"cat\n{name}\nbee\n", encoding="utf-8")
        names = external.class_names(tmp_path / "names.txt")
        assert names == raw.classes
        images, labels, _ = external.images_of(path, classes=names)
        assert (images[:, 0, 0, 0] // 50 == np.array([2, 0, 1])[labels]).all()
    with pytest.raises(DataError, match="each has to be named once"):
        sources.folder(settings(path, classes=["cat", "bee", "caf\u00e9", "cafe\u0301"]))
    (tmp_path / "names.txt").write_text("caf\u00e9\ncafe\u0301\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: .* stands there already"):
        external.class_names(tmp_path / "names.txt")


def test_a_zip_with_backslashes_has_folders_too(tmp_path: Path, files: Files) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for folder in sorted({name.rpartition("/")[0] for name in files} | {"train", "test"}):
            archive.writestr(folder.replace("/", "\\") + "\\", b"")
        for name, content in files.items():
            archive.writestr(name.replace("/", "\\"), content)
    raw = sources.folder(settings(tmp_path / "a.zip"))
    assert raw.reading["skipped"] == {}
    assert raw.images.shape == (24, 3, 8, 8)


def test_a_class_too_rare_for_a_part_of_the_training_split_is_named(tmp_path: Path) -> None:
    counts = {"train/rare": 2, "train/usual": 40, "test/rare": 2, "test/usual": 2}
    files = {f"{name}/{i}.png": picture(10 * k + i) for k, (name, n) in enumerate(counts.items()) for i in range(n)}
    path = as_zip(tmp_path / "a.zip", files)
    expected = r"data\.n_train is 10: data\.validation \(20\) leaves 1 training images of 'rare', and .* needs 2 of each class"
    with pytest.raises(DataError, match=expected):
        prepared.prepare(settings(path, validation=20, n_train=10))
    assert len(prepared.prepare(settings(path, validation=20, n_train=22))[0].train) == 22
    assert len(prepared.prepare(settings(path, validation=20))[0].train) == 22


def test_sixteen_bits_that_hold_twelve_are_refused(tmp_path: Path) -> None:
    def deep(value: int) -> bytes:
        memory = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(memory, "PNG")
        return memory.getvalue()

    files = {f"{s}/{c}/{i}.png": deep(4095 - i) for s in ("train", "test") for c in "ab" for i in range(4)}
    with pytest.raises(DataError, match="its 16 16-bit images have no value above 4095, so they would be"):
        sources.folder(settings(as_zip(tmp_path / "a.zip", files)))
    raw = sources.folder(settings(as_zip(tmp_path / "b.zip", {**files, "train/a/0.png": deep(65535)})))
    assert raw.reading["converted"] == {"16-bit grey to 8 bits (v >> 8)": 16}
    assert raw.images.max() == 255
    for kind, colour in deep_colours(np.arange(4096 - 64, 4096, dtype=np.uint16).reshape(8, 8)).items():
        with pytest.raises(DataError, match="its 16 16-bit images have no value above 4"):
            sources.folder(settings(as_zip(tmp_path / "c.zip", dict.fromkeys(files, colour))))
        raw = sources.folder(settings(as_zip(tmp_path / "c.zip", {**dict.fromkeys(files, colour), "train/a/0.png": deep(65535)})))
        assert sum(n for rule, n in raw.reading["converted"].items() if rule.startswith("16-bit")) == 16, kind


def test_duplicates_are_counted_by_their_pixels(tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 6 test images 3 are training images (one as BMP, one under another label); two training images are copies."""

    def as_bmp(content: bytes) -> bytes:
        memory = io.BytesIO()
        Image.open(io.BytesIO(content)).save(memory, "BMP")
        return memory.getvalue()

    files = {name: picture(10 * i) for i, name in enumerate(files)}
    files["test/ant/00.png"] = files["train/ant/03.png"]
    files["test/ant/01.bmp"] = as_bmp(files["train/ant/04.png"])
    del files["test/ant/01.png"]
    files["test/bee/00.png"] = files["train/cat/02.png"]
    files["train/ant/90.png"] = files["train/ant/91.png"] = files["train/ant/05.png"]
    _, card = prepared.prepare(settings(as_folder(tmp_path / "images", files)))
    found = card["duplicates"]
    assert found["test_in_train"] + found["test_in_validation"] == 3
    assert found["within_train"] + found["within_validation"] + found["validation_in_train"] == 2
    assert (found["within_test"], found["conflicting_labels"]) == (0, 1)
    assert "pictures that bear more than one label: 1" in card["warnings"]
    without = [f"evaluation.attack.protocols.{name}.n=0" for name in ("standard", "released", "standard_l2")]  # three classes are too few
    profile = params.load(ROOT / "params/digits.yaml", without).model_copy(update={"data": settings(tmp_path / "images")})
    prepare.run(profile, tmp_path / "data.npz", tmp_path / "card.json")
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [f"warning: {line}" for line in card["warnings"]]
    assert len(said) >= 3
    _, clean = prepared.prepare(DataSettings(source="digits", test=497, validation=130))
    assert set(clean["duplicates"].values()) == {0}
    assert clean["warnings"] == []


# Prepared data that this project did not write


def npz(path: Path, arrays: dict[str, np.ndarray], compress: bool = False) -> Path:
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


FORGED: dict[str, tuple[dict[str, object], str]] = {
    "index beyond": ({"train": np.array([0, 9999])}, "indices of the splits"),
    "negative index": ({"test": np.array([-1])}, "indices of the splits"),
    "image in two splits": ({"test": np.array([0, 1]), "train": np.array([0, 2])}, "indices of the splits"),
    "empty split": ({"validation": np.array([], np.int64)}, "validation is int64 .0,."),
    "labels beyond": ({"labels": np.full(1797, 10)}, "labels are .1797,. in 10..10"),
    "negative labels": ({"labels": np.full(1797, -1)}, "in -1..-1"),
    "unsigned labels": ({"labels": np.zeros(1797, np.uint64)}, "labels is uint64"),
    "fewer labels": ({"labels": np.zeros(3, np.int64)}, "labels are .3,."),
    "float images": ({"images": np.zeros((1797, 1, 8, 8), np.float32)}, "images is float32"),
    "flat images": ({"images": np.zeros((1797, 64), np.uint8)}, "images is uint8 .1797, 64."),
    "two channels": ({"images": np.zeros((1797, 2, 8, 8), np.uint8)}, "1 or 3"),
    "other pixels": ({"images": np.full((1797, 1, 8, 8), 7, np.uint8)}, "data_hash"),
    "divided": ({"images": np.ones((1797, 1, 8, 8), np.uint8)}, "no pixel is above 1"),
    "nan means": ({"class_mean": np.full((10, 1, 8, 8), np.nan, np.float32)}, "class_mean"),
    "means of another shape": ({"class_mean": np.zeros((9, 1, 8, 8), np.float32)}, "class_mean"),
    "number classes": ({"classes": np.arange(10)}, "classes is int64"),
    "a class twice": ({"classes": np.array(["a"] * 10)}, "none twice"),
    "objects": ({"classes": np.array(["a", {}], dtype=object)}, "Python objects"),
    "without classes": ({"classes": None}, "without classes"),
    "hash of another type": ({"data_hash": np.zeros(3)}, "data_hash is float64"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_prepared_data_is_refused(kind: str, tmp_path: Path, digits: Prepared) -> None:
    prepared.save(digits, {}, tmp_path / "data.npz", tmp_path / "card.json")
    with np.load(tmp_path / "data.npz") as file:
        arrays = dict(file)
    changed, expected = FORGED[kind]
    path = npz(tmp_path / "forged.npz", {k: v for k, v in {**arrays, **changed}.items() if v is not None})
    with pytest.raises(DataError, match=expected) as caught:
        prepared.load(path)
    assert "forged.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def stated(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    memory = io.BytesIO()
    np.lib.format.write_array_header_1_0(memory, {"descr": dtype, "fortran_order": False, "shape": shape})
    return memory.getvalue()


MEMBERS: dict[str, tuple[bytes, str]] = {  # of an .npz, deflated
    "terabytes": (stated((10**6, 3, 1024, 1024)), "which is not what follows"),
    "negative": (stated((-1, 8)) + bytes(64), "which is not what follows"),
    "too short": (stated((4, 8)) + bytes(8), "which is not what follows"),
    "too long": (stated((4, 8)) + bytes(99), "which is not what follows"),
    "header of 4 GB": (b"\x93NUMPY\2\0" + b"\xff" * 4 + bytes(50_000_000), "not a readable .npz"),
    "swollen": (stated((70_000_000,)) + bytes(70_000_000), "an array expands from"),
    "version 9": (b"\x93NUMPY\x09\0" + bytes(99), "not a readable .npz|format version"),
    "no array": (b"hello", "not a readable .npz"),
    "nothing": (b"", "not a readable .npz"),
    "code": (b"\x93NUMPY\1\0\x20\0" + b"__import__('os').abort()".ljust(32), "not a readable .npz"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_npz_members_are_checked_before_they_are_read(kind: str, tmp_path: Path) -> None:
    content, expected = MEMBERS[kind]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    with peak_below(8_000_000), pytest.raises(DataError, match=expected):
        arrays_of(tmp_path / "a.npz")


def test_small_npz_members_do_not_swell_together_and_only_those_asked_for_are_read(tmp_path: Path) -> None:
    zeros = {f"a{i}": np.zeros(12 * 2**20, np.uint8) for i in range(6)}  # 72 MiB from 72 kB
    path = npz(tmp_path / "a.npz", {"b": np.arange(3), **zeros}, compress=True)
    with peak_below(8_000_000), pytest.raises(DataError, match=r"6 arrays together expand from 7\d,\d{3} to 75,498,240 bytes; 200 times"):
        arrays_of(path)
    with peak_below(8_000_000):
        assert list(arrays_of(path, names=("b", "none"))) == ["b"]
        assert list(ebjdat.files.read_npz(path, ["b"])) == ["b"]
    assert len(arrays_of(path, names=list(zeros)[:5])) == 5
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8)
    path = npz(tmp_path / "b.npz", {"images": images, "labels": np.arange(4), **zeros}, compress=True)
    with peak_below(8_000_000):
        assert np.array_equal(external.images_of(path)[0], images)


def test_grey_images_count_as_what_they_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = {f"{s}/{c}/{i}.png": picture(i, mode="L") for s in ("train", "test") for c in "ab" for i in range(4)}
    monkeypatch.setattr(sources, "DATA_LIMIT", 47 * 64)
    assert sources.folder(settings(as_zip(tmp_path / "a.zip", grey))).images.nbytes == 16 * 64
    with pytest.raises(DataError, match="images take more than 3,008 bytes as uint8"):
        sources.folder(settings(as_zip(tmp_path / "b.zip", {**grey, "train/a/0.png": picture(1)})))


def test_npz_files_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(12).reshape(3, 4),
        "f": np.asfortranarray(np.random.default_rng(0).normal(size=(4, 5))),
        "t": np.array(["é", "x"]),
    }
    arrays |= {"s": np.array(3.5), "empty": np.zeros((0, 5), np.uint8), "b": np.array([True, False]), "big": np.arange(5, dtype=">i4")}
    for compress in (False, True):
        found = arrays_of(npz(tmp_path / "a.npz", arrays, compress))
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in arrays.items())
    with pytest.raises(DataError, match=r"its arrays have .* bytes; at most 100 are allowed"):
        arrays_of(tmp_path / "a.npz", limit=100)
    with pytest.raises(FileNotFoundError):
        arrays_of(tmp_path / "none.npz")
    with pytest.raises(DataError, match="is not a file"):
        arrays_of(tmp_path)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        arrays_of(tmp_path / "a.npz")
