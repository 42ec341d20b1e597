"""Extra training images, as a generator makes them: arrays or class folders, of the same classes and shape as the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat.data.sources import check_range, folder
from ebjdat.errors import DataError, few
from ebjdat.files import arrays_of
from ebjdat.settings import DataSettings

# Names of an .npz: images and labels, and the order of an image's axes. The first is this project's own (samples.npz), the second EDM's.
LAYOUTS = {("images", "labels"): "NCHW", ("image", "label"): "NHWC"}


def read_extra(
    settings: DataSettings, shape: tuple[int, int, int], classes: tuple[str, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Images uint8 (N, C, H, W) of `settings.extra`, labels (N,) in the order of `classes`, and notes on how files were read.

    An .npz has uint8 images and integer labels, by one of LAYOUTS; a folder or archive has train/<class>/<image>, the classes by
    name, and is read with the settings of source `folder`. Raises DataError where they are not of this shape (C, H, W) and these
    classes.
    """
    path = Path(settings.extra or "")
    where = f"data.extra: {path}"
    if path.suffix == ".npz":
        images, labels = _arrays(path, where, shape)
        notes: list[str] = []
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(f"{where}: labels go from {labels.min()} to {labels.max()}; 0 to {len(classes) - 1} are the data's classes")
    else:
        raw = folder(settings.model_copy(update={"source": "folder", "path": str(path), "classes": None}), ("train",))
        images, notes = raw.images, [*raw.notes(), *raw.warnings()]
        if unknown := sorted(set(raw.classes) - set(classes)):
            raise DataError(f"{where}: folders of no class of the data: {few(map(repr, unknown))}; its classes: {few(map(repr, classes))}")
        labels = np.array([classes.index(name) for name in raw.classes], np.int64)[raw.labels]
        if images.shape[1:] != shape:
            raise DataError(f"{where}: images are {_size(images.shape[1:])}, those of the data {_size(shape)}")
    check_range(images, where)
    return np.ascontiguousarray(images), labels.astype(np.int64), notes


def _arrays(path: Path, where: str, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images (N, C, H, W) and labels (N,) of an .npz."""
    try:
        found = arrays_of(path, names={name for names in LAYOUTS for name in names})
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no such file") from error
    layout = next((names for names in LAYOUTS if set(names) <= set(found)), None)
    if layout is None:
        needed = " or ".join(f"`{images}` and `{labels}`" for images, labels in LAYOUTS)
        raise DataError(f"{where}: arrays {needed} are needed, found {', '.join(sorted(found)) or 'none of these'}")
    images, labels = (found[name] for name in layout)
    axes = LAYOUTS[layout]
    expected = tuple(shape["CHW".index(axis)] for axis in axes[1:])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected or not len(images):
        raise DataError(f"{where}: `{layout[0]}` is {images.dtype} {images.shape}; uint8 (N, {', '.join(map(str, expected))}) is needed")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{where}: `{layout[1]}` is {labels.dtype} {labels.shape}; an integer for each of {len(images)} images is needed")
    return images if axes == "NCHW" else images.transpose(0, 3, 1, 2), labels


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
