"""Images and labels of other people's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebjdat.data import external
from ebjdat.data.prepared import Prepared
from ebjdat.errors import DataError


def test_what_is_wrong_with_images_is_said(tmp_path: Path, digits: Prepared) -> None:
    good, labels = digits.images[:4], digits.labels[:4]
    for arrays, message in (
        ({"images": good}, "arrays `images` and `labels` are needed, found images"),
        ({"images": good.transpose(0, 2, 3, 1), "labels": labels}, r"uint8 \(N, 1 or 3, H, W\) is needed"),
        ({"images": good / 255, "labels": labels}, "images are float64"),
        ({"images": good, "labels": labels[:3]}, "one non-negative integer per image"),
        ({"images": good, "labels": labels - 20}, "one non-negative integer per image"),
    ):
        np.savez(tmp_path / "data.npz", **arrays)
        with pytest.raises(DataError, match=message):
            external.images_of(tmp_path / "data.npz")
    (tmp_path / "data.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        external.images_of(tmp_path / "data.npz")
    with pytest.raises(DataError, match="there is no such file"):
        external.images_of(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            lambda x: x,
            lambda y: np.eye(10, dtype=np.int64)[y],
            r"integer per image is needed, 4 of them \(of one-hot rows",
        ),
        (lambda x: x, lambda y: y[:, None], r"\(labels\[:, 0\]\)"),
        (lambda x: x, lambda y: y.astype(np.float32), "labels are float32"),
        (lambda x: x, lambda y: y > 3, "labels are bool"),
        (lambda x: x, lambda y: y.astype("m8[s]"), "labels are timedelta64"),
        (lambda x: x, lambda y: np.full(4, 2**63 + 1, np.uint64), "they go from 9223372036854775809 to 9223372036854775809"),
        (lambda x: x.transpose(0, 2, 3, 1), lambda y: y, r"\(images.transpose\(0, 3, 1, 2\)\)"),
        (lambda x: x[:, 0], lambda y: y, r"\(images\[:, None\]\)"),
        (lambda x: (x > 99).astype(np.uint8), lambda y: y, "no pixel is above 1; pixels in 0..255 are needed"),
        (lambda x: x.astype(np.float32), lambda y: y, r"np.rint\(images \* 255\)"),
        (lambda x: x[:, :, :0], lambda y: y, r"images are uint8 \(4, 1, 0, 8\)"),
    ],
)
def test_images_and_labels_of_another_kind_are_refused_with_what_mends_them(
    tmp_path: Path, digits: Prepared, images: Any, labels: Any, message: str
) -> None:
    np.savez(tmp_path / "data.npz", images=images(digits.images[:4]), labels=labels(digits.labels[:4]))
    with pytest.raises(DataError, match=message) as raised:
        external.images_of(tmp_path / "data.npz")
    assert "\n" not in str(raised.value)
