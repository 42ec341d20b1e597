"""Test images from elsewhere."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ebjdat.data import prepared
from ebjdat.data.sources import check_range, folder
from ebjdat.errors import DataError, brief
from ebjdat.files import arrays_of, names_of
from ebjdat.settings import DataSettings

LONGEST_NAMES = 2**20  # bytes of a file of class names
HIGHEST_LABEL = 2**31 - 1


class Labelled(NamedTuple):
    """images: uint8 (N, C, H, W); labels: int64 (N,); notes: how files were read where that is not obvious, a line each."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    notes: tuple[str, ...] = ()


def images_of(path: Path, size: int | None = None, classes: tuple[str, ...] | None = None) -> Labelled:
    """Test images, uint8 (N, C, H, W), and labels (N,) of a data file of this project, of an .npz with arrays `images` and `labels`,
    or of a folder or archive with test/<class>/<image> (and train/<class>/...), shuffled by a fixed seed.

    size: for folders, scale the shorter side to it and crop the centre. classes: for folders, their names in the network's
    order, which the labels then have; it may hold more. Raises DataError.
    """
    if path.suffix != ".npz":
        try:
            settings = DataSettings(source="folder", path=str(path), size=size, validation=1)
        except ValidationError as error:
            wrong = error.errors()[0]
            why = wrong["msg"].removeprefix("Value error, ")
            raise DataError(f"{brief(ascii(str(path)), 80)}: {wrong['loc'][0]}: {why}") from error
        raw = folder(settings)
        if classes is not None:
            raw = replace(raw, reading={**raw.reading, "class_order": "given"})
        order = np.random.default_rng(0).permutation(np.flatnonzero(raw.test))
        images = np.ascontiguousarray(raw.images[order])
        check_range(images, str(path))
        return Labelled(images, _reordered(path, raw.classes, raw.labels[order], classes), (*raw.notes(), *raw.warnings()))
    if size is not None or classes is not None:
        option = "--classes" if size is None else "--size"
        raise DataError(f"{path}: {option} is for folders and archives; images and labels of an .npz stay as they are")
    try:
        names = set(names_of(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    if {"images", "labels", "test", "data_hash"} <= names:
        return Labelled(*prepared.load(path).split("test"))
    if not {"images", "labels"} <= names:
        raise DataError(f"{path}: arrays `images` and `labels` are needed, found {', '.join(sorted(names)) or 'none'}")
    found = arrays_of(path, names=("images", "labels"))
    images, labels = found["images"], found["labels"]
    if problem := _wrong_images(images) or _wrong_labels(labels, len(images)):
        raise DataError(f"{path}: {problem}")
    check_range(images, str(path))
    return Labelled(np.ascontiguousarray(images), labels.astype(np.int64))


def _wrong_images(images: NDArray[np.generic]) -> str | None:
    """What is wrong and how to fix it; None where nothing is."""
    problem = f"images are {images.dtype} {images.shape}; uint8 (N, 1 or 3, H, W) is needed"
    if images.dtype != np.uint8:
        fix = " (of pixels in [0, 1]: np.rint(images * 255).astype(np.uint8))" if images.dtype.kind == "f" else ""
        return problem + fix
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        fix = " (images[:, None])" if images.ndim == 3 else ""
        fix = " (images.transpose(0, 3, 1, 2))" if images.ndim == 4 and images.shape[3] in (1, 3) else fix
        return problem + fix
    return None if images.size else problem


def _wrong_labels(labels: NDArray[np.generic], n: int) -> str | None:
    problem = f"labels are {labels.dtype} {labels.shape}; one non-negative integer per image is needed, {n} of them"
    if labels.shape != (n,):
        fix = " (of one-hot rows: labels.argmax(1))" if labels.ndim == 2 and labels.shape[1:] != (1,) else ""
        fix = " (labels[:, 0])" if labels.shape == (n, 1) else fix
        return problem + fix
    if labels.dtype.kind not in "iu":
        return problem
    if labels.min() < 0 or labels.max() > HIGHEST_LABEL:
        return f"{problem}; they go from {labels.min()} to {labels.max()}"
    return None


def class_names(path: Path) -> tuple[str, ...]:
    """The classes of a text file, one per line. Raises DataError for another file, and for a duplicate name."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'not a file' if path.exists() else 'there is no such file'}")
        if path.stat().st_size > LONGEST_NAMES:
            raise DataError(f"{path}: has {path.stat().st_size:,} bytes; class names, one per line, take at most {LONGEST_NAMES:,}")
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))  # as names of folders are
        names = tuple(line.strip() for line in text.splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a text file of class names ({error})") from error
    while names and not names[-1]:
        names = names[:-1]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name or first.setdefault(name, number) != number:
            raise DataError(
                f"{path}, line {number}: {'is empty' if not name else f'{name!r} is a duplicate'}; one class per line is needed"
            )
    if not names:
        raise DataError(f"{path}: is empty; one class per line is needed")
    return names


def _reordered(path: Path, folders: tuple[str, ...], labels: NDArray[np.int64], classes: tuple[str, ...] | None) -> NDArray[np.int64]:
    """Labels (N,), places in `folders`, as places in `classes`."""
    if classes is None:
        return labels
    place = {name: k for k, name in enumerate(classes)}
    if missing := [name for name in folders if name not in place]:
        raise DataError(
            f"{path}: the class {missing[0]!r} is not in --classes{f', nor are {len(missing) - 1} others' if missing[1:] else ''}"
        )
    return np.array([place[name] for name in folders], dtype=np.int64)[labels]
