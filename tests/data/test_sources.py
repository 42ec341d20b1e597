"""Sources: real digits, class folders in every layout, and what is refused."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ebjdat import registry
from ebjdat.data import external, prepared, sources
from ebjdat.data.prepared import Prepared, check_record
from ebjdat.settings import DataSettings, ParamsError, load

from ..conftest import ROOT
from .conftest import KINDS, THREE, Files, as_folder, as_zip, grey, picture, read, refusal, saved, settings, tree
from .test_decode import deep_colours


def test_digits_are_scikit_learns(digits: Prepared) -> None:
    """Every image is one of the bundled ones with its label, all are used once, and the range is [0, 1] in 1/16 steps."""
    bundled = {
        (image * 255 / 16).round().astype(np.uint8).tobytes(): int(y) for image, y in zip(*load_digits(return_X_y=True), strict=True)
    }
    used = [(image.tobytes(), int(y)) for image, y in zip(digits.images, digits.labels, strict=True)]
    assert all(bundled[image] == y for image, y in used)
    assert len({image for image, _ in used}) == len(used) == 1797
    assert set(np.unique(digits.images)) == {round(v * 255 / 16) for v in range(17)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train": 1796}, "train is 1797"),
        ({"test": 5}, "train is 1300"),
        ({"shape": (3, 8, 8)}, "shape is"),
        ({"classes": 9}, "classes is 10"),
    ],
)
def test_data_that_differ_from_their_record_are_refused(change: dict[str, object], expected: str) -> None:
    record = registry.SOURCES["digits"]
    raw = sources.digits(DataSettings(source="digits", test=497, validation=130))
    check_record(raw, record, "digits")
    assert f"source 'digits': {expected}" in refusal(lambda: check_record(raw, replace(record, **change), "digits"))


def test_flips_that_change_labels_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"training\.augment\.flip: a mirrored image of .digits. may lose its label"):
        load(ROOT / "params/digits.yaml", ["training.augment.flip=true"])
    assert load(ROOT / "params/cifar10.yaml", ["training.augment.flip=true"])


def test_a_torchvision_set_with_a_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive is truncated; torchvision notices its checksum and tries the network, which is absent."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"truncated")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = DataSettings(source="cifar10", root=str(tmp_path), validation=10)
    assert "CIFAR10 is missing or incomplete under" in refusal(lambda: sources.cifar10(asked))


def test_a_torchvision_sets_splits_are_read_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(name: str, split: str, root: str, download: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        asked.append((name, split, root, download))
        n = {"train": 3, "test": 2}[split]
        return np.full((n, 3, 32, 32), n, np.uint8), np.arange(n), ("a", "b", "c")

    monkeypatch.setattr(sources, "torchvision_split", fake)
    raw = sources.svhn(DataSettings(source="svhn", root="there", validation=10))
    assert (raw.images[:, 0, 0, 0].tolist(), raw.test.tolist(), raw.labels.tolist()) == (
        [3, 3, 3, 2, 2],
        [False] * 3 + [True] * 2,
        [0, 1, 2, 0, 1],
    )
    assert sources.cifar100(DataSettings(source="cifar100", validation=10), ("test",), False).test.tolist() == [True, True]
    assert asked == [("SVHN", "train", "there", True), ("SVHN", "test", "there", True), ("CIFAR100", "test", "datasets", False)]


# Class folders


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_archives_give_the_same_data(kind: str, tmp_path: Path, files: Files) -> None:
    shuffled = dict(sorted(files.items(), key=lambda item: item[1]))
    data, card = prepared.prepare(settings(KINDS[kind](tmp_path, shuffled)))
    assert data.data_hash == prepared.prepare(settings(as_folder(tmp_path / "other", files)))[0].data_hash
    assert data.classes == ("ant", "bee", "cat")
    assert card["counts"] == {s: dict.fromkeys(("ant", "bee", "cat"), n) for s, n in (("train", 5), ("validation", 1), ("test", 2))}
    for split, offset in (("train", 0), ("test", 20)):
        for image, label in zip(*data.split(split), strict=True):  # the red channel says which file it was
            assert image[0, 0, 0] - offset - 50 * label in range(6)
            assert image[2, 0, 0] == 255 - image[0, 0, 0]


def test_images_stay_grey_if_all_are_and_count_as_what_they_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tree(grey)
    monkeypatch.setattr(sources, "DATA_LIMIT", 16 * 64)
    assert read(as_zip(tmp_path / "a.zip", files)).images.shape == (16, 1, 8, 8)
    mixed = as_zip(tmp_path / "b.zip", {**files, "train/a/0.png": picture(9)})
    assert "images take more than 1,024 bytes as uint8" in refusal(lambda: read(mixed))
    monkeypatch.setattr(sources, "DATA_LIMIT", 3 * 16 * 64)
    assert read(mixed).images.shape == (16, 3, 8, 8)
    assert (read(mixed).images[-1] == 3).all()


@pytest.mark.parametrize("kind", THREE)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train/ant/00.png": picture(1, size=9)}, "is 9x9 RGB, others are 8x8 RGB"),
        ({"train/ant/00.png": b"no image"}, r"'train/ant/00\.png' is not a readable image"),
        ({"train/ant/00.png": picture(1)[:50]}, r"'train/ant/00\.png' is not a readable image"),
        ({"train/dog/00.png": picture(1)}, "no images in test/dog"),
        ({"test/ant/00.png": None, "test/ant/01.png": None}, "no images in test/ant"),
        ({"train/ant/deeper/1.png": picture(1)}, "is not train/<class>/<image>"),
        ({"train/1.png": picture(1)}, r"'train/1\.png' is not train/<class>/<image>"),
        ({"Train/ant/1.png": picture(1)}, "two folders for the train split"),
        ({"more/train/ant/1.png": picture(1)}, "two folders for the train split"),
        (
            {"train/a\x1b[31mnt/1.png": picture(1)},
            r"class names must be printable text of at most 255 bytes; rename the folder 'a\\x1b\[31mnt'",
        ),
        ({"train/a\nnt/1.png": picture(1)}, r"rename the folder 'a\\nnt'"),
        ({"train/\u202eant/1.png": picture(1)}, "printable"),
    ],
)
def test_bad_images_and_places_are_refused(kind: str, change: dict[str, bytes | None], expected: str, tmp_path: Path, files: Files) -> None:
    broken = {name: content for name, content in {**files, **change}.items() if content is not None}
    assert re.search(expected, refusal(lambda: read(KINDS[kind](tmp_path, broken))))


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("none.zip", None, "there is no such folder or archive"),
        ("a.rar", None, "must be a folder or an archive ending in"),
        ("flat", {"1.png": picture(1)}, "no train/<class>/ or test/<class>/ folders; skipped 1 file: 1 outside train/ and test/ ('1.png')"),
        ("deep.zip", {"train/a/b/c/1.png": picture(1)}, "is not train/<class>/<image>"),
        ("one.zip", tree(picture, classes="a"), "only one class, 'a'; at least two are needed"),
        ("long.zip", tree(lambda i: saved(Image.new("L", (9, 8), i))), "they must be square with at least 8 pixels a side"),
        ("tiny.zip", tree(lambda i: picture(i, size=7)), "images are 7x7 RGB; they must be square with at least 8 pixels"),
    ],
)
def test_unknown_paths_and_layouts_are_refused(name: str, files: Files | None, expected: str, tmp_path: Path) -> None:
    if files:
        (as_zip if name.endswith(".zip") else as_folder)(tmp_path / name, files)
    elif name == "a.rar":
        (tmp_path / name).write_bytes(b"x")
    assert expected in refusal(lambda: read(tmp_path / name))


def test_images_of_any_size_are_scaled_and_cropped_at_the_centre(tmp_path: Path) -> None:
    """Images with a black left and a white right half: the centre square keeps the edge in its middle."""

    def halves(i: int) -> bytes:
        width, height = ((40, 20), (20, 20), (30, 64), (16, 16))[i]
        return saved(Image.fromarray(np.repeat([[0, 255]], width // 2, 1).repeat(height, 0).astype(np.uint8)).convert("RGB"))

    path = as_zip(tmp_path / "a.zip", tree(halves))
    assert "data.size" in refusal(lambda: read(path))
    images = read(path, size=10).images
    assert images.shape == (16, 3, 10, 10)
    assert (images[..., :4] < 30).all()
    assert (images[..., 6:] > 225).all()


JUNK = dict.fromkeys(
    (
        *(f"{place}Thumbs.db" for place in ("", "train/", "train/ant/")),
        *(".DS_Store", "train/.DS_Store", "train/ant/._00.png", "README.md", "train/LICENSE", "test/bee/desktop.ini", "authors"),
        *("__MACOSX/train/ant/._00.png", "train/@eaDir/00.png", ".git/config", "train/ant/@eaDir/00.png/x.jpg", ".git/1.png"),
        *("train/CVS/Root", "train/ant/.gitkeep", "train/ant/LICENSE.0.md", ".cache/train/x", "train/bee/._1.png"),
    ),
    b"x",
)
COUNTED: dict[str, Sequence[str]] = {
    ".avif": [f"train/ant/{i}.avif" for i in range(3)],
    ".csv": ["train/labels.csv", "train/bee/notes/why.csv"],
    "no suffix": ["test/cat/noname"],
    "outside train/ and test/": ["cover.png", "val/ant/00.png"],
    "in an ignored folder": ["train/CVS/1.png", "test/.net/1.png", ".cache/1.jpg", "train/bee/__pycache__/deep/1.PNG"],
    "whose name begins with a dot": ["train/ant/.hidden.png"],
}
NAMED_LIKE_DOCUMENTS = {f"train/ant/{n}": picture(200) for n in ("license.0.png", "notice.12.png", "README.photo.jpeg", "license.png")}


@pytest.mark.parametrize("enclosing", ["", "set/"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_read_counted_or_known_junk(kind: str, enclosing: str, tmp_path: Path, files: Files) -> None:
    """The same tree gives the same data and the same counts, whatever holds it, also below one enclosing folder."""
    images = {**files, **NAMED_LIKE_DOCUMENTS}
    skipped = dict.fromkeys(itertools.chain(*COUNTED.values()), b"x")
    data, card = prepared.prepare(
        settings(KINDS[kind](tmp_path, {f"{enclosing}{name}": content for name, content in {**images, **JUNK, **skipped}.items()}))
    )
    plain, plain_card = prepared.prepare(settings(as_folder(tmp_path / "plain", images)))
    assert data.data_hash == plain.data_hash
    assert (plain_card["reading"]["skipped"], plain_card["notes"], len(data.images)) == ({}, [], 28)
    assert {name: kind["n"] for name, kind in card["reading"]["skipped"].items()} == {name: len(names) for name, names in COUNTED.items()}
    assert all(kind["example"].removeprefix(enclosing) in COUNTED[name] for name, kind in card["reading"]["skipped"].items())
    assert card["warnings"][0].startswith("skipped 13 files: 4 in an ignored folder ('")


def test_special_files_in_an_ignored_folder_are_no_reason_to_refuse(tmp_path: Path, files: Files) -> None:
    path = as_folder(tmp_path / "images", {**files, "train/.here/1.png": picture(1)})
    (path / "train/.loop").symlink_to(path)
    (path / "train/.there").symlink_to(tmp_path)
    (path / "train/.here/nowhere").symlink_to("none")
    os.mkfifo(path / "train/.here/x.png")
    raw = read(path)
    assert raw.reading["skipped"]["in an ignored folder"]["n"] == 2
    assert len(raw.images) == 24


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "JPG", "ppm", "pgm", "pbm", "pnm", "gif", "webp", "Tif"])
def test_images_of_every_suffix_are_read(suffix: str, tmp_path: Path, files: Files) -> None:
    """Half of the images have it; the format is that of the content."""
    renamed = {(name[:-3] + suffix if name < "train/bee" else name): content for name, content in files.items()}
    assert read(as_zip(tmp_path / "a.zip", renamed)).images.shape == (24, 3, 8, 8)


def test_cases_of_the_split_folders_are_read_and_reported(tmp_path: Path, files: Files) -> None:
    renamed = {name.replace("train/", "Training set/TRAIN/"): content for name, content in files.items()}
    data, card = prepared.prepare(settings(as_zip(tmp_path / "a.zip", renamed)))
    assert card["notes"] == ["the folder 'Training set/TRAIN' is the train split"]
    assert data.data_hash == prepared.prepare(settings(as_zip(tmp_path / "b.zip", files)))[0].data_hash


# Classes and ranges


def test_classes_that_look_alike_are_reported(tmp_path: Path, files: Files) -> None:
    names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("Ant", "c at") for i in range(3)]
    more = {name: picture(200 + i) for i, name in enumerate(names)}
    raw = read(as_zip(tmp_path / "a.zip", {**files, **more}))
    assert "classes that differ only in case or spaces: 'Ant', 'ant', 'c at', 'cat'" in raw.warnings()
    assert len(raw.classes) == 5


def test_folders_named_by_numbers_are_in_numeric_order_or_as_given(tmp_path: Path) -> None:
    names = [str(c) for c in range(12)]
    files = {f"{s}/{c}/{i}.png": grey(int(c)) for s in ("train", "test") for c in names for i in range(3)}
    path = as_zip(tmp_path / "a.zip", files)
    raw = read(path)
    assert raw.classes == tuple(names)
    assert (raw.images[:, 0, 0, 0] == raw.labels).all()
    assert raw.reading["class_order"] == "numeric"
    assert [*external.images_of(path).notes] == raw.notes() == ["classes are in numeric order (0, 1, 2, ...), not sorted as text"]
    assert external.images_of(path, classes=tuple(names)).notes == ()
    named = {name.replace("/11/", "/eleven/"): content for name, content in files.items()}
    assert read(as_zip(tmp_path / "b.zip", named)).classes == (*sorted(names[:-1]), "eleven")
    text = sorted(names)
    given = read(path, classes=text)
    assert given.classes == tuple(text)
    assert (given.images[:, 0, 0, 0] == np.array([int(c) for c in text])[given.labels]).all()
    for wrong, expected in (
        ([*text, "12"], "without a folder: '12'"),
        (text[1:], "not listed: '0'"),
        ([*text, "0"], "every class folder once"),
    ):
        assert expected in refusal(lambda wrong=wrong: read(path, classes=wrong))


def test_class_names_are_compared_in_one_form_of_unicode(tmp_path: Path, files: Files) -> None:
    path = as_zip(
        tmp_path / "a.zip", {n.replace("test/ant", "test/cafe\u0301").replace("train/ant", "train/caf\u00e9"): c for n, c in files.items()}
    )
    for name in ("caf\u00e9", "cafe\u0301"):
        raw = read(path, classes=["cat", name, "bee"])
        assert raw.classes == ("cat", "caf\u00e9", "bee")
        (tmp_path / "names.txt").write_text(f"cat\n{name}\nbee\n", encoding="utf-8")
        names = external.class_names(tmp_path / "names.txt")
        assert names == raw.classes
        images, labels, _ = external.images_of(path, classes=names)
        for found, label in ((raw.images, raw.labels), (images, labels)):
            assert (found[:, 0, 0, 0] // 50 == np.array([2, 0, 1])[label]).all()
    assert "every class folder once" in refusal(lambda: read(path, classes=["cat", "bee", "caf\u00e9", "cafe\u0301"]))
    (tmp_path / "names.txt").write_text("caf\u00e9\ncafe\u0301\n", encoding="utf-8")
    assert "line 2: " in refusal(lambda: external.class_names(tmp_path / "names.txt"))


def test_images_divided_by_255_are_refused(tmp_path: Path) -> None:
    masks = tree(lambda i: grey(i % 2))
    expected = r"a\.zip, training images: no pixel is above 1; pixels in 0\.\.255 are needed\. Were they"
    assert re.search(expected, refusal(lambda: prepared.prepare(settings(as_zip(tmp_path / "a.zip", masks)))))
    half = as_folder(tmp_path / "half", {name: grey(200) if name.startswith("train") else content for name, content in masks.items()})
    assert "half, test images: no pixel is above 1" in refusal(lambda: prepared.prepare(settings(half)))
    for size in (None, 8):
        assert "half: no pixel is above 1" in refusal(lambda size=size: external.images_of(half, size))


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [("a\nb", None, r"'a\\nb': path: printable"), ("a", 4, "'a': size: .* equal to 8"), ("x" * 5000, None, "path: .* at most 4096 char")],
)
def test_external_paths_and_sizes_that_no_settings_allow_are_refused(path: str, size: int | None, expected: str) -> None:
    assert re.search(expected, refusal(lambda: external.images_of(Path(path), size)))


def test_sixteen_bits_that_hold_twelve_are_refused(tmp_path: Path) -> None:
    def deep(value: int) -> bytes:
        return saved(Image.fromarray(np.full((8, 8), value, np.uint16)))

    low = np.arange(4096 - 64, 4096, dtype=np.uint16).reshape(8, 8)
    for kind, dark in {"grey": tree(lambda i: deep(4095 - i)), **{k: tree(lambda _, c=c: c) for k, c in deep_colours(low).items()}}.items():
        path = tmp_path / f"{kind}.zip"
        assert "its 16 16-bit images have no value above 4" in refusal(lambda dark=dark, path=path: read(as_zip(path, dark)))
        raw = read(as_zip(path, {**dark, "train/a/0.png": deep(65535)}))
        assert sum(n for rule, n in raw.reading["converted"].items() if rule.startswith("16-bit")) == 16, kind
        assert raw.images.max() == 255
