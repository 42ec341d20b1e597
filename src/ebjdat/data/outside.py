"""Test images that this project did not prepare."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebjdat.data import prepared
from ebjdat.data.sources import DataError, folder
from ebjdat.params import DataSettings


def images_of(path: Path, size: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 images (N, C, H, W) and labels (N,) of a data file of this project (its test split), of an .npz with arrays `images`
    and `labels`, or of a folder or archive with test/<class>/<image> (and train/<class>/...), shuffled by a fixed seed.

    size: for folders, scale the shorter side to it and crop the centre. Raises DataError.
    """
    if path.suffix != ".npz":
        raw = folder(DataSettings(source="folder", path=str(path), size=size, validation=1))
        order = np.random.default_rng(0).permutation(np.flatnonzero(raw.test))
        return np.ascontiguousarray(raw.images[order]), raw.labels[order]
    if size is not None:
        raise DataError(f"{path}: --size is for folders and archives; images of an .npz stay as they are")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            images, labels = (file["images"], file["labels"]) if {"images", "labels"} <= names else (None, None)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from error
    if {"images", "labels", "test", "data_hash"} <= names:
        return prepared.load(path).split("test")
    if images is None or labels is None:
        raise DataError(f"{path}: arrays `images` and `labels` are needed, found {', '.join(sorted(names)) or 'none'}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"{path}: images are {images.dtype} {images.shape}; uint8 (N, 1 or 3, H, W) is needed")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or not len(images) or labels.min() < 0:
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}; one non-negative integer per image is needed")
    return np.ascontiguousarray(images), labels.astype(np.int64)
