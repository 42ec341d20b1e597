"""Splits, class means, duplicates, and prepared files that this project did not write."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ebjdat.data import prepared, sources
from ebjdat.data.prepared import Prepared
from ebjdat.settings import DataSettings, ImbalanceSettings, load
from ebjdat.stages import prepare

from ..conftest import ROOT
from .conftest import Files, as_folder, as_zip, picture, refusal, saved, settings


def of_digits(**more: int) -> DataSettings:
    return DataSettings.model_validate({"source": "digits", "test": 497, "validation": 130, **more})


def tailed(ratio: float = 10, largest: int = 120, split_seed: int = 0, **more: float) -> DataSettings:
    """Digits of which the later classes are rare."""
    imbalance = {"ratio": ratio, "largest": largest, **more}
    return DataSettings.model_validate({"source": "digits", "test": 497, "split_seed": split_seed, "imbalance": imbalance})


def test_splits_are_disjoint_stratified_and_fixed(digits: Prepared) -> None:
    parts = [set(part.tolist()) for part in (digits.train, digits.validation, digits.test)]
    assert [len(p) for p in parts] == [1170, 130, 497]
    assert len(set.union(*parts)) == 1797
    shares = np.bincount(digits.labels) / len(digits.labels)
    for part in parts:
        counts = np.bincount(digits.labels[list(part)], minlength=10)
        assert np.abs(counts - shares * len(part)).max() <= 1.01  # as near as whole images allow
    again, other = (prepared.prepare(of_digits(split_seed=seed))[0] for seed in (0, 1))
    assert again.data_hash == digits.data_hash != other.data_hash


def test_limits_keep_classes_and_the_first_test_examples(digits: Prepared) -> None:
    small, _ = prepared.prepare(of_digits(n_train=100, n_test=50))
    assert np.bincount(small.labels[small.train]).min() >= 9
    assert np.array_equal(small.split("test")[0], digits.split("test", 50)[0])
    assert len(prepared.prepare(of_digits(n_train=1165))[0].train) == 1165


@pytest.mark.parametrize(
    ("ratio", "total", "classes"),
    [
        (10, 20_431, None),
        (50, 13_996, [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]),
        (100, 12_406, None),
        (1, 50_000, [5000] * 10),
    ],
)
def test_the_sizes_of_cifar10_lt_are_the_published_ones(ratio: float, total: int, classes: list[int] | None) -> None:
    """Training and validation together; what settings are validated with is the training split alone."""
    imbalance = ImbalanceSettings(ratio=ratio, largest=5000)
    sizes = imbalance.drawn(10)
    assert sum(sizes) == total
    assert classes is None or sizes == classes
    data = DataSettings(source="cifar10", imbalance=imbalance)
    assert data.training_size() == total - sum(int(0.2 * n) for n in sizes)
    assert data.test_size() == 10_000
    assert DataSettings(source="folder", path="x", imbalance=imbalance).training_size() is None  # of how many classes?


def test_a_long_tailed_split_has_its_sizes_and_the_same_test_split(digits: Prepared) -> None:
    """The last int(0.2 n) of each class's images are the validation split; every image is one of the source's training images."""
    found, card = prepared.prepare(tailed())
    sizes = [int(120 * 10 ** (-c / 9)) for c in range(10)]
    assert sizes[0] == 120
    assert sizes[-1] == 12
    assert np.bincount(found.split("validation")[1], minlength=10).tolist() == [int(0.2 * n) for n in sizes]
    assert np.bincount(found.split("train")[1], minlength=10).tolist() == [n - int(0.2 * n) for n in sizes]
    assert tailed().training_size() == len(found.train)
    assert all(np.array_equal(a, b) for a, b in zip(found.split("test"), digits.split("test"), strict=True))
    whole = {image.tobytes() for name in ("train", "validation") for image in digits.split(name)[0]}
    own = [image.tobytes() for name in ("train", "validation") for image in found.split(name)[0]]
    assert len(set(own)) == len(own) == sum(sizes)
    assert set(own) <= whole
    assert (np.diff(found.split("train")[1]) < 0).any()  # mixed, not class after class
    assert list(card["counts"]["train"].values()) == [n - int(0.2 * n) for n in sizes]
    assert card["notes"] == [
        f"long-tailed: 120 to 12 images per class in the order of the labels, {sum(sizes)} in all, of which 0.2 of each class's "
        "(rounded down) are the validation split"
    ]


def test_a_long_tailed_split_is_a_function_of_its_seed_and_drawn_class_by_class() -> None:
    """Against the drawing written out: one generator, classes in order, the first n of each after a shuffle."""
    first, again, other = (prepared.prepare(tailed(split_seed=seed))[0] for seed in (3, 3, 4))
    assert first.data_hash == again.data_hash != other.data_hash
    raw = sources.digits(tailed(split_seed=3))
    rng = np.random.default_rng(3)
    for c in range(10):
        indices = np.array([i for i in range(1797) if raw.labels[i] == c and not raw.test[i]])
        rng.shuffle(indices)
        n = int(120 * 10 ** (-c / 9))
        held = int(0.2 * n)
        for name, part in (("train", indices[: n - held]), ("validation", indices[n - held : n])):
            images, labels = first.split(name)
            assert {image.tobytes() for image in images[labels == c]} == {raw.images[i].tobytes() for i in part}


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"largest": 500}, "draw 500 images of class '0', of its 129 training images; lower largest"),
        ({"ratio": 200}, "ratio 200 and largest 120 draw 0 images of class '9', which leaves none for training; lower ratio"),
        ({"ratio": 1, "largest": 128}, "draw 128 images of class '1?[1-9]', of its 12[0-9] training images"),
        ({"ratio": 1, "largest": 3}, "imbalance.validation is 0.2 of each class: no image of any"),
    ],
)
def test_impossible_long_tails_are_refused(wrong: dict[str, float], expected: str) -> None:
    assert re.search(expected, refusal(lambda: prepared.prepare(tailed(**wrong))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"n_train": 5}, "n_train is 5; at least one"),
        ({"n_train": 1200}, "the training split has 1170"),
        ({"n_test": 600}, "n_test is 600"),
        ({"test": 5}, "test is 5: allowed are 10 .one per digit. to 1787"),
        ({"test": 1790, "validation": 6}, "test is 1790: allowed are 10 .one per digit. to 1787"),
        ({"test": 1787, "validation": 9}, "at least 2 training images per class"),
    ],
)
def test_impossible_splits_are_refused(wrong: dict[str, int], expected: str) -> None:
    assert re.search(expected, refusal(lambda: prepared.prepare(of_digits(**wrong))))


def test_a_class_too_rare_for_a_part_of_the_training_split_is_named(tmp_path: Path) -> None:
    counts = {"train/rare": 2, "train/usual": 40, "test/rare": 2, "test/usual": 2}
    path = as_zip(
        tmp_path / "a.zip", {f"{name}/{i}.png": picture(10 * k + i) for k, (name, n) in enumerate(counts.items()) for i in range(n)}
    )
    expected = r"data\.n_train is 10: data\.validation \(20\) leaves 1 training images of 'rare', but .* needs 2 of each class"
    assert re.search(expected, refusal(lambda: prepared.prepare(settings(path, validation=20, n_train=10))))
    for more in ({"n_train": 22}, {}):
        assert len(prepared.prepare(settings(path, validation=20, **more))[0].train) == 22


def test_class_means(digits: Prepared) -> None:
    images, labels = digits.split("train")
    for k in range(10):
        slow = sum(image.astype(float) for image, y in zip(images, labels, strict=True) if y == k) / (255 * (labels == k).sum())
        assert np.abs(digits.class_mean[k] - slow).max() < 1e-6  # float32


def test_duplicates_are_counted_by_their_pixels(tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 6 test images 3 are training images (one as BMP, one under another label); two training images are copies."""
    files = {name: picture(10 * i) for i, name in enumerate(files)}
    files["test/ant/00.png"] = files["train/ant/03.png"]
    files["test/ant/01.bmp"] = saved(Image.open(io.BytesIO(files["train/ant/04.png"])), "BMP")
    del files["test/ant/01.png"]
    files["test/bee/00.png"] = files["train/cat/02.png"]
    files["train/ant/90.png"] = files["train/ant/91.png"] = files["train/ant/05.png"]
    _, card = prepared.prepare(settings(as_folder(tmp_path / "images", files)))
    n = card["duplicates"]
    assert n["test_in_train"] + n["test_in_validation"] == 3
    assert n["within_train"] + n["within_validation"] + n["validation_in_train"] == 2
    assert (n["within_test"], n["conflicting_labels"]) == (0, 1)
    assert "pictures with more than one label: 1" in card["warnings"]
    without = [f"evaluation.attack.protocols.{name}.n=0" for name in ("standard", "released", "standard_l2")]  # three classes are too few
    profile = dataclasses.replace(load(ROOT / "params/digits.yaml", without), data=settings(tmp_path / "images"))
    prepare.run(profile, tmp_path / "data.npz", tmp_path / "card.json")
    printed = capsys.readouterr().out.splitlines()[1:]
    assert printed == [f"warning: {line}" for line in card["warnings"]]
    assert len(printed) >= 3
    _, clean = prepared.prepare(of_digits())
    assert (set(clean["duplicates"].values()), clean["warnings"]) == ({0}, [])


def test_nothing_is_left_half_written(tmp_path: Path, files: Files) -> None:
    data, card = prepared.prepare(settings(as_folder(tmp_path / "images", files)))
    assert card["sizes"] == {"train": 15, "validation": 3, "test": 6}
    out = tmp_path / "out" / "data.npz"
    with pytest.raises(TypeError):
        prepared.save(data, {"not JSON": object()}, out, tmp_path / "out" / "card.json")
    assert sorted(p.name for p in out.parent.iterdir()) == ["data.npz"]  # whole, and no temporary file
    assert prepared.load(out).data_hash == data.data_hash
    out.write_bytes(out.read_bytes()[:200])
    assert "damaged prepared data" in refusal(lambda: prepared.load(out))
    assert "run the prepare stage first" in refusal(lambda: prepared.load(tmp_path / "none.npz"))


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
    "other pixels": ({"images": np.full((1797, 1, 8, 8), 7, np.uint8)}, "do not match its data_hash"),
    "divided": ({"images": np.ones((1797, 1, 8, 8), np.uint8)}, "no pixel is above 1"),
    "nan means": ({"class_mean": np.full((10, 1, 8, 8), np.nan, np.float32)}, "class_mean"),
    "means of another shape": ({"class_mean": np.zeros((9, 1, 8, 8), np.float32)}, "class_mean"),
    "number classes": ({"classes": np.arange(10)}, "classes is int64"),
    "duplicate classes": ({"classes": np.array(["a"] * 10)}, "at least two different names"),
    "objects": ({"classes": np.array(["a", {}], dtype=object)}, "Python objects"),
    "without classes": ({"classes": None}, "classes missing"),
    "hash of another type": ({"data_hash": np.zeros(3)}, "data_hash is float64"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_prepared_data_is_refused(kind: str, tmp_path: Path, digits: Prepared) -> None:
    prepared.save(digits, {}, tmp_path / "data.npz", tmp_path / "card.json")
    changed, expected = FORGED[kind]
    with np.load(tmp_path / "data.npz") as file:
        arrays = {name: array for name, array in {**file, **changed}.items() if array is not None}
    np.savez(tmp_path / "forged.npz", **arrays)
    message = refusal(lambda: prepared.load(tmp_path / "forged.npz"))
    assert re.search(expected, message)
    assert "forged.npz" in message
