"""Prepared data: one file with uint8 arrays, labels, fixed splits and class means, and its data card."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat import registry
from ebjdat.data.sources import DataError, Raw
from ebjdat.files import write_json, write_npz
from ebjdat.params import DataSettings


@dataclass(frozen=True)
class Prepared:
    """images: uint8 (N, C, H, W); labels: int64 (N,); train/validation/test: indices into them, in their fixed order.

    class_mean: float32 (K, C, H, W) in [0, 1], means of the class Gaussians (the covariance is that of the training images
    themselves; see samplers.starts).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    class_mean: NDArray[np.float32]
    classes: tuple[str, ...]
    data_hash: str

    def split(self, name: str, n: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and labels of the first n (None: all) of a split."""
        index: NDArray[np.int64] = getattr(self, name)[:n]
        return self.images[index], self.labels[index]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width


def make_splits(raw: Raw, settings: DataSettings) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Train, validation and test indices: stratified, shuffled, and a function of split_seed alone.

    The test split keeps the source's own order where that means something (torchvision's), so that "the first n" are the
    examples that other work calls so; otherwise its order is a fixed shuffle. Raises DataError when a split cannot be made.
    """
    from sklearn.model_selection import train_test_split

    official = np.flatnonzero(~raw.test)
    smallest = int(np.bincount(raw.labels[official]).min())
    classes = len(raw.classes)
    if not classes <= settings.validation <= len(official) - classes or smallest < 2:
        raise DataError(
            f"data.validation is {settings.validation}: allowed are {classes} (one per class) to {len(official) - classes}, "
            f"and at least 2 training images per class (the smallest class has {smallest})"
        )
    seed = settings.split_seed
    train, validation = train_test_split(official, test_size=settings.validation, stratify=raw.labels[official], random_state=seed)
    if settings.n_train is not None:
        if settings.n_train > len(train):
            raise DataError(f"data.n_train is {settings.n_train}, but the training split has {len(train)} images")
        if settings.n_train < classes:
            raise DataError(f"data.n_train is {settings.n_train}; at least one image for each of the {classes} classes is needed")
        if settings.n_train <= len(train) - classes:
            train, _ = train_test_split(train, train_size=settings.n_train, stratify=raw.labels[train], random_state=seed)
        train = train[: settings.n_train]  # nearly all: shuffled already, and the rest is too small to stratify
    test = np.flatnonzero(raw.test)
    if not raw.ordered:
        test = np.random.default_rng(seed).permutation(test)
    if settings.n_test is not None:
        if settings.n_test > len(test):
            raise DataError(f"data.n_test is {settings.n_test}, but the test split has {len(test)} images")
        test = test[: settings.n_test]
    return train, validation, test


def prepare(settings: DataSettings) -> tuple[Prepared, dict[str, Any]]:
    """Read the source, make the splits and the data card."""
    raw: Raw = registry.load(registry.SOURCES, settings.source)(settings)
    train, validation, test = make_splits(raw, settings)
    kept = np.concatenate([train, validation, test])
    images, labels = raw.images[kept], raw.labels[kept]
    ends = np.cumsum([len(train), len(validation), len(test)])
    index = np.arange(len(kept))
    train, validation, test = index[: ends[0]], index[ends[0] : ends[1]], index[ends[1] :]

    absent = [raw.classes[k] for k in range(len(raw.classes)) if not (labels[train] == k).any()]
    if absent:
        raise DataError(f"no training images are left of {', '.join(absent)}; raise data.n_train or lower data.validation")
    class_mean = np.stack([images[train][labels[train] == k].mean(0) / 255 for k in range(len(raw.classes))]).astype(np.float32)
    arrays = {"images": images, "labels": labels, "train": train, "validation": validation, "test": test}
    hashes = {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for name, array in arrays.items()}
    data_hash = hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest()[:16]
    prepared = Prepared(images, labels, train, validation, test, class_mean, raw.classes, data_hash)
    card = {
        "name": settings.name,
        "source": settings.source,
        "origin": registry.SOURCES[settings.source].source,
        "image_shape": list(prepared.image_shape),
        "dtype": "uint8",
        "classes": list(raw.classes),
        "counts": {
            name: {c: int((prepared.split(name)[1] == k).sum()) for k, c in enumerate(raw.classes)}
            for name in ("train", "validation", "test")
        },
        "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
        "split_seed": settings.split_seed,
        "sha256": hashes,
        "data_hash": data_hash,
    }
    return prepared, card


def save(prepared: Prepared, card: dict[str, Any], path: Path, card_path: Path) -> None:
    """Write the arrays (npz, no pickled objects) and the card (JSON), each atomically."""
    names = ("images", "labels", "train", "validation", "test", "class_mean")
    arrays = {name: getattr(prepared, name) for name in names}
    write_npz(path, {**arrays, "classes": np.array(prepared.classes), "data_hash": np.array(prepared.data_hash)})
    write_json(card_path, card)


def load(path: Path) -> Prepared:
    """Read prepared data. Raises DataError when the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Prepared(
                images=file["images"],
                labels=file["labels"],
                train=file["train"],
                validation=file["validation"],
                test=file["test"],
                class_mean=file["class_mean"],
                classes=tuple(file["classes"].tolist()),
                data_hash=str(file["data_hash"]),
            )
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no prepared data; run the prepare stage first") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged prepared data ({error}); delete it and run the prepare stage again") from error
