"""Extra training images: read from arrays and folders, refused where they do not fit, kept with the data."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ebjdat.data import prepared
from ebjdat.data.prepared import Prepared
from ebjdat.settings import DataSettings, ParamsError, load

from ..chain import Chain
from ..conftest import ROOT
from .conftest import KINDS, THREE, Files, as_folder, as_zip, grey, picture, refusal, settings

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8), np.arange(30) % 10


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def with_extra(path: Path) -> DataSettings:
    return DataSettings(source="digits", test=497, validation=130, extra=str(path))


def test_arrays_of_either_layout_are_the_same_images(digits: Prepared, tmp_path: Path) -> None:
    """This project's names and order of axes, and EDM's; unsigned labels too. The data without them stay what they were."""
    own = prepared.prepare(with_extra(npz(tmp_path / "own.npz", images=IMAGES, labels=LABELS)))
    edm = prepared.prepare(with_extra(npz(tmp_path / "edm.npz", image=IMAGES.transpose(0, 2, 3, 1), label=LABELS.astype(np.uint8))))
    for data, card in (own, edm):
        images, labels = data.split("extra")
        assert np.array_equal(images, IMAGES)
        assert np.array_equal(labels, LABELS)
        assert labels.dtype == np.int64
        assert card["sizes"] == {"train": 1170, "validation": 130, "test": 497, "extra": 30}
        assert card["counts"]["extra"] == {str(k): 3 for k in range(10)}
        assert set(card["sha256"]) == {"images", "labels", "train", "validation", "test", "extra_images", "extra_labels"}
        assert np.array_equal(data.images, digits.images)
        assert np.array_equal(data.class_mean, digits.class_mean)
    assert own[0].data_hash == edm[0].data_hash != digits.data_hash
    other = prepared.prepare(with_extra(npz(tmp_path / "other.npz", images=IMAGES, labels=LABELS[::-1])))[0]
    assert other.data_hash != own[0].data_hash
    assert digits.extra() == {}
    assert "no extra images; set data.extra and prepare them again" in refusal(lambda: digits.split("extra"))


def test_prepared_data_keep_them(digits: Prepared, tmp_path: Path) -> None:
    data, card = prepared.prepare(with_extra(npz(tmp_path / "extra.npz", images=IMAGES, labels=LABELS)))
    prepared.save(data, card, tmp_path / "data.npz", tmp_path / "card.json")
    again = prepared.load(tmp_path / "data.npz")
    assert again.data_hash == data.data_hash
    assert all(np.array_equal(a, b) for a, b in zip(again.split("extra"), data.split("extra"), strict=True))
    whole = dict(np.load(tmp_path / "data.npz"))
    for wrong, expected in (
        ({"extra_labels": LABELS + 1}, "do not fit the images"),
        ({"extra_labels": LABELS[1:]}, "do not fit the images"),
        ({"extra_images": IMAGES[:, :, 1:]}, "do not fit the images"),
        ({"extra_images": 255 - IMAGES}, "do not match its data_hash"),
        ({"extra_images": IMAGES.astype(np.int64)}, "extra_images is int64"),
        ({"extra_images": IMAGES[:0], "extra_labels": LABELS[:0]}, "extra_images is uint8"),
    ):
        np.savez(tmp_path / "forged.npz", **{**whole, **wrong})  # type: ignore[arg-type]
        assert expected in refusal(lambda: prepared.load(tmp_path / "forged.npz"))
    np.savez(tmp_path / "forged.npz", **{name: array for name, array in whole.items() if name != "extra_labels"})
    assert "extra_labels missing" in refusal(lambda: prepared.load(tmp_path / "forged.npz"))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": IMAGES}, "arrays `images` and `labels` or `image` and `label` are needed, found images"),
        ({"pictures": IMAGES}, "are needed, found none of these"),
        ({"images": IMAGES.astype(np.float32), "labels": LABELS}, "`images` is float32 (30, 1, 8, 8); uint8 (N, 1, 8, 8) is needed"),
        ({"images": np.repeat(IMAGES, 3, 1), "labels": LABELS}, "`images` is uint8 (30, 3, 8, 8); uint8 (N, 1, 8, 8) is needed"),
        ({"images": IMAGES[:, :, :7, :7], "labels": LABELS}, "uint8 (N, 1, 8, 8) is needed"),
        ({"images": IMAGES[:, 0], "labels": LABELS}, "uint8 (N, 1, 8, 8) is needed"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "uint8 (N, 1, 8, 8) is needed"),
        ({"image": IMAGES, "label": LABELS}, "`image` is uint8 (30, 1, 8, 8); uint8 (N, 8, 8, 1) is needed"),
        ({"images": IMAGES, "labels": LABELS + 1}, "labels go from 1 to 10; 0 to 9 are the data's classes"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels go from -1 to 8"),
        ({"images": IMAGES, "labels": LABELS[:-1]}, "`labels` is int64 (29,); an integer for each of 30 images is needed"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "`labels` is float64 (30,); an integer"),
        ({"images": IMAGES, "labels": np.array([None] * 30)}, "holds Python objects"),
        ({"images": IMAGES // 255, "labels": LABELS}, "no pixel is above 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_a_line(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    message = refusal(lambda: prepared.prepare(with_extra(npz(tmp_path / "extra.npz", **arrays))))
    assert "extra.npz" in message
    assert expected in message


def test_files_that_are_not_there_or_unreadable_are_refused(tmp_path: Path) -> None:
    assert "data.extra" in refusal(lambda: prepared.prepare(with_extra(tmp_path / "none.npz")))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    assert "not a readable .npz file" in refusal(lambda: prepared.prepare(with_extra(tmp_path / "broken.npz")))
    refusal(lambda: prepared.prepare(with_extra(tmp_path / "nothing")))


@pytest.mark.parametrize("kind", THREE)
def test_class_folders_have_their_labels_by_name(tmp_path: Path, files: Files, kind: str) -> None:
    """Some of the data's classes, in any order, test images unread; the labels are those of the data."""
    data = as_folder(tmp_path / "data", files)
    more = {"train/cat/a.png": picture(90), "train/ant/b.png": picture(91), "test/cat/c.png": picture(92), "train/ant/notes.csv": b"1"}
    extra = KINDS[kind](tmp_path, more)
    found, card = prepared.prepare(settings(data, extra=str(extra)))
    images, labels = found.split("extra")
    assert labels.tolist() == [0, 2]
    assert images[:, 0, 0, 0].tolist() == [91, 90]
    assert any(line.startswith("extra images: skipped 2 files: ") for line in card["notes"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"train/dog/a.png": picture(1)}, "folders of no class of the data: 'dog'; its classes: 'ant', 'bee', 'cat'"),
        ({"train/ant/a.png": grey(99)}, "images are 8x8 with 1 channel, those of the data 8x8 with 3 channels"),
        ({"train/ant/a.png": picture(1, size=9)}, "images are 9x9 with 3 channels, those of the data 8x8"),
        ({"test/ant/a.png": picture(1)}, "no train/<class>/ folders; skipped 1 file"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, files: Files, more: Files, expected: str) -> None:
    data, extra = as_zip(tmp_path / "data.zip", files), as_zip(tmp_path / "extra.zip", more)
    assert expected in refusal(lambda: prepared.prepare(settings(data, extra=str(extra))))


def test_extra_images_that_are_test_images_are_counted(tmp_path: Path, digits: Prepared) -> None:
    images = np.concatenate([digits.split("test", 2)[0], digits.split("validation", 1)[0], digits.split("train", 4)[0]])
    _, card = prepared.prepare(with_extra(npz(tmp_path / "extra.npz", images=images, labels=LABELS[:7])))
    assert {name: n for name, n in card["duplicates"].items() if n} == {"extra_in_test": 2, "extra_in_validation": 1}
    assert card["warnings"] == ["extra images that are also test images: 2", "extra images that are also validation images: 1"]


def test_a_share_of_no_images_is_refused(tmp_path: Path) -> None:
    given = [f"data.extra={tmp_path}/none.npz", "experiments.pgd_at.training.extra={share: 0.7, shuffled_labels: true}"]
    profile = load(ROOT / "params/digits.yaml", given)
    assert profile.training_settings("pgd_at").extra_images == int(0.7 * profile.training.batch_size)
    assert not profile.training_settings("jempp").extra.share
    for override, expected in {
        "training.extra.share=0.7": "share 0.7 is of the images of data.extra, which is not set",
        "experiments.pgd_at.training.extra.shuffled_labels=true": "shuffled_labels changes nothing: share is 0",
        "training.extra.share=1": "less than 1",
    }.items():
        with pytest.raises(ParamsError, match=re.escape(expected)):
            load(ROOT / "params/digits.yaml", [override])
    with pytest.raises(ParamsError, match=r"extra\.share 0\.001 of a batch of \d+ is no image"):
        load(ROOT / "params/digits.yaml", [given[0], "training.extra.share=0.001"])


def test_a_chains_samples_are_extra_images(chain: Chain, tmp_path: Path) -> None:
    """What the generate stage wrote, as it is."""
    (path,) = chain.folder.rglob("samples.npz")
    images, labels = prepared.prepare(with_extra(path))[0].split("extra")
    with np.load(path) as wrote:
        assert np.array_equal(images, wrote["images"])
        assert np.array_equal(labels, wrote["labels"])
