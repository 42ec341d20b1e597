"""Prepared data: one file of uint8 images, labels, fixed splits and class means, with a data card."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat import registry
from ebjdat.data.sources import Raw, check_range
from ebjdat.errors import DataError
from ebjdat.files import arrays_of, write_npz, write_result
from ebjdat.settings import DataSettings, ImbalanceSettings

HASHED = ("images", "labels", "train", "validation", "test")
EXTRA = {"extra_images": ("uint8", 4), "extra_labels": ("int64", 1)}  # arrays that only some data have
DUPLICATES = {  # counts of `duplicates` that cause a warning
    "test_in_train": "test images that are also training images, pixel by pixel",
    "test_in_validation": "test images that are also validation images",
    "validation_in_train": "validation images that are also training images",
    "within_train": "training images that are copies of others",
    "within_test": "test images that are copies of others",
    "conflicting_labels": "pictures with more than one label",
    "extra_in_test": "extra images that are also test images",
    "extra_in_validation": "extra images that are also validation images",
}
DTYPES = {  # arrays of the file: dtype and number of dimensions
    "images": ("uint8", 4),
    **dict.fromkeys(("labels", "train", "validation", "test"), ("int64", 1)),
    "class_mean": ("float32", 4),
}


@dataclass(frozen=True)
class Prepared:
    """images: uint8 (N, C, H, W); labels: int64 (N,); train/validation/test: indices into them, in a fixed order.

    class_mean: float32 (K, C, H, W) in [0, 1], means of the class Gaussians (samplers.starts takes the covariance from the training
    images). extra_images, extra_labels: more training images, if the data have any; no mean or Gaussian counts them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    class_mean: NDArray[np.float32]
    classes: tuple[str, ...]
    data_hash: str
    extra_images: NDArray[np.uint8] | None = None
    extra_labels: NDArray[np.int64] | None = None

    def extra(self) -> dict[str, NDArray[Any]]:
        """The arrays of EXTRA, where the data have them."""
        return {name: array for name in EXTRA if (array := getattr(self, name)) is not None}

    def split(self, name: str, n: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and labels of the first n (None: all) of a split, or of the "extra" images. Raises DataError where there are none."""
        if name == "extra":
            if self.extra_images is None or self.extra_labels is None:
                raise DataError("training.extra.share is above 0, but the data have no extra images; set data.extra and prepare them again")
            return self.extra_images[:n], self.extra_labels[:n]
        index: NDArray[np.int64] = getattr(self, name)[:n]
        return self.images[index], self.labels[index]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width


def make_splits(raw: Raw, settings: DataSettings) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Train, validation and test indices: stratified or long-tailed, shuffled, and a function of split_seed alone.

    The test split keeps a meaningful order of the source (torchvision's), so that "the first n" are the same examples as in other
    work; otherwise its order is a fixed shuffle. Raises DataError when a split cannot be made.
    """
    train, validation = _long_tailed(raw, settings, settings.imbalance) if settings.imbalance else _stratified(raw, settings)
    test = np.flatnonzero(raw.test)
    if not raw.ordered:
        test = np.random.default_rng(settings.split_seed).permutation(test)
    if settings.n_test is not None:
        if settings.n_test > len(test):
            raise DataError(f"data.n_test is {settings.n_test}, but the test split has {len(test)} images")
        test = test[: settings.n_test]
    return train, validation, test


def _long_tailed(raw: Raw, settings: DataSettings, imbalance: ImbalanceSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation indices, in mixed order: of each class's images, shuffled, the first so many; their last are validation.

    One generator of split_seed serves all classes, in the order of their labels. Raises DataError where a class has too few images.
    """
    rng = np.random.default_rng(settings.split_seed)
    parts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for c, n in enumerate(imbalance.drawn(len(raw.classes))):
        of_class = np.flatnonzero(~raw.test & (raw.labels == c))
        held = imbalance.held_out(n)
        if not held < n <= len(of_class):
            what = f"of its {len(of_class)} training images" if n > len(of_class) else "which leaves none for training"
            raise DataError(
                f"data.imbalance: ratio {imbalance.ratio:g} and largest {imbalance.largest} draw {n} images of class {raw.classes[c]!r}, "
                f"{what}; lower {'largest' if n > len(of_class) else 'ratio, or raise largest'}"
            )
        rng.shuffle(of_class)
        for part, some in zip(parts, (of_class[: n - held], of_class[n - held : n]), strict=True):
            part.append(some)
    train, validation = (rng.permutation(np.concatenate(part)) for part in parts)
    if not len(validation):
        raise DataError(f"data.imbalance.validation is {imbalance.validation:g} of each class: no image of any; raise it, or `largest`")
    return train, validation


def _stratified(raw: Raw, settings: DataSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation indices with all classes in their shares. Raises DataError when a split cannot be made."""
    from sklearn.model_selection import train_test_split

    asked = settings.validation or 0
    official = np.flatnonzero(~raw.test)
    smallest = int(np.bincount(raw.labels[official]).min())
    classes = len(raw.classes)
    if not classes <= asked <= len(official) - classes or smallest < 2:
        raise DataError(
            f"data.validation is {asked}: allowed are {classes} (one per class) to {len(official) - classes}, "
            f"and at least 2 training images per class (the smallest class has {smallest})"
        )
    seed = settings.split_seed
    train, validation = train_test_split(official, test_size=asked, stratify=raw.labels[official], random_state=seed)
    if settings.n_train is not None:
        if settings.n_train > len(train):
            raise DataError(f"data.n_train is {settings.n_train}, but the training split has {len(train)} images")
        if settings.n_train < classes:
            raise DataError(f"data.n_train is {settings.n_train}; at least one image for each of the {classes} classes is needed")
        if settings.n_train <= len(train) - classes:
            counts = np.bincount(raw.labels[train], minlength=classes)
            if counts.min() < 2:
                raise DataError(
                    f"data.n_train is {settings.n_train}: data.validation ({asked}) leaves {counts.min()} training images of "
                    f"{raw.classes[counts.argmin()]!r}, but a stratified subset needs 2 of each class; lower data.validation, or use all "
                    f"{len(train)} (data.n_train: null)"
                )
            train, _ = train_test_split(train, train_size=settings.n_train, stratify=raw.labels[train], random_state=seed)
        train = train[: settings.n_train]  # nearly all: already shuffled, and the rest is too small to stratify
    return train, validation


def prepare(settings: DataSettings) -> tuple[Prepared, dict[str, Any]]:
    """Read the source, make the splits and the data card."""
    raw: Raw = registry.load(registry.SOURCES, settings.source)(settings)
    check_record(raw, settings.record, settings.source)
    peaks = raw.images.max((1, 2, 3))
    for split, part in (("training", ~raw.test), ("test", raw.test)):
        check_range(peaks[part], f"{settings.path or settings.name}, {split} images")
    train, validation, test = make_splits(raw, settings)
    kept = np.concatenate([train, validation, test])
    images, labels = raw.images[kept], raw.labels[kept]
    ends = np.cumsum([len(train), len(validation), len(test)])
    index = np.arange(len(kept))
    train, validation, test = index[: ends[0]], index[ends[0] : ends[1]], index[ends[1] :]

    absent = [raw.classes[k] for k in range(len(raw.classes)) if not (labels[train] == k).any()]
    if absent:
        raise DataError(f"no training images are left for {', '.join(absent)}; raise data.n_train or lower data.validation")
    class_mean = np.stack([images[train[labels[train] == k]].mean(0) / 255 for k in range(len(raw.classes))]).astype(np.float32)
    arrays = dict(zip(HASHED, (images, labels, train, validation, test), strict=True))
    notes: list[str] = []
    if settings.extra is not None:
        *extra, notes = registry.load(registry.EXTRA, "extra")(settings, images.shape[1:], raw.classes)
        arrays |= dict(zip(EXTRA, extra, strict=True))
    hashes = _hashes(arrays)
    prepared = Prepared(**arrays, class_mean=class_mean, classes=raw.classes, data_hash=_data_hash(hashes))
    doubles = duplicates(prepared)
    card = {
        "name": settings.name,
        "source": settings.source,
        "origin": registry.SOURCES[settings.source].source,
        "image_shape": list(prepared.image_shape),
        "dtype": "uint8",
        "classes": list(raw.classes),
        "counts": {
            name: {c: int((prepared.split(name)[1] == k).sum()) for k, c in enumerate(raw.classes)}
            for name in ("train", "validation", "test", *(["extra"] if prepared.extra() else []))
        },
        "sizes": {"train": len(train), "validation": len(validation), "test": len(test)}
        | ({} if prepared.extra_labels is None else {"extra": len(prepared.extra_labels)}),
        "split_seed": settings.split_seed,
        "reading": dict(raw.reading),
        "duplicates": doubles,
        "notes": [
            *raw.notes(),
            *_of_imbalance(settings, labels[np.concatenate([train, validation])]),
            *(f"extra images: {note}" for note in notes),
        ],
        "warnings": raw.warnings() + [f"{what}: {doubles[key]}" for key, what in DUPLICATES.items() if doubles.get(key)],
        "sha256": hashes,
        "data_hash": prepared.data_hash,
    }
    return prepared, card


def _of_imbalance(settings: DataSettings, labels: NDArray[np.int64]) -> list[str]:
    """What the card says of a long-tailed split. labels: of its training and validation images."""
    if settings.imbalance is None:
        return []
    n = np.bincount(labels)
    return [
        f"long-tailed: {n.max()} to {n.min()} images per class in the order of the labels, {n.sum()} in all, "
        f"of which {settings.imbalance.validation:g} of each class's (rounded down) are the validation split"
    ]


def check_record(raw: Raw, record: registry.Source, name: str) -> None:
    """Raises DataError where the data are not what the source's record states, which settings were validated against."""
    n, n_test = len(raw.test), int(raw.test.sum())
    sizes = {"train": n - n_test, "test": n_test} if record.test else {"train": n}
    for what, value in {**sizes, "shape": raw.images.shape[1:], "classes": len(raw.classes)}.items():
        if (stated := getattr(record, what)) not in (None, value):
            raise DataError(f"source {name!r}: {what} is {value}, but its record in registry/data.py states {stated}")


def _hashes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    return {name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in arrays.items()}


def _data_hash(hashes: Mapping[str, str]) -> str:
    # Sorted, although that hides which array has which hash (the card says): results contain this hash, so it must not change.
    return hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest()[:16]


def duplicates(data: Prepared) -> dict[str, int]:
    """Counts of images with equal pixels. `*_in_train`, `test_in_validation`: images of the first split that also occur in the second;
    `within_*`: images beyond the first of each content; `conflicting_labels`: contents with more than one label. `extra_in_*`: of
    data with extra images.
    """
    contents = [hashlib.sha256(image.data).digest() for image in np.ascontiguousarray(data.images)]
    parts = {name: [contents[i] for i in getattr(data, name)] for name in ("train", "validation", "test")}
    found = {name: set(part) for name, part in parts.items()}
    labels: dict[bytes, set[int]] = defaultdict(set)
    for content, label in zip(contents, data.labels.tolist(), strict=True):
        labels[content].add(label)
    extra = [] if data.extra_images is None else [hashlib.sha256(image.data).digest() for image in data.extra_images]
    return {
        "test_in_train": sum(content in found["train"] for content in parts["test"]),
        "test_in_validation": sum(content in found["validation"] for content in parts["test"]),
        "validation_in_train": sum(content in found["train"] for content in parts["validation"]),
        **{f"within_{name}": len(part) - len(found[name]) for name, part in parts.items()},
        "conflicting_labels": sum(len(some) > 1 for some in labels.values()),
        **({f"extra_in_{name}": sum(content in found[name] for content in extra) for name in ("validation", "test")} if extra else {}),
    }


def save(prepared: Prepared, card: dict[str, Any], path: Path, card_path: Path) -> None:
    """Write the arrays (npz, no pickled objects) and the card (JSON), each atomically."""
    names = ("images", "labels", "train", "validation", "test", "class_mean")
    arrays = {name: getattr(prepared, name) for name in names} | prepared.extra()
    write_npz(path, {**arrays, "classes": np.array(prepared.classes), "data_hash": np.array(prepared.data_hash)})
    write_result(card_path, card)


def load(path: Path) -> Prepared:
    """Read prepared data. Raises DataError when the file is missing, damaged, or not as `save` writes it."""
    try:
        arrays = arrays_of(path, names={*DTYPES, *EXTRA, "classes", "data_hash"})
    except FileNotFoundError as error:
        raise DataError(f"{path}: no prepared data; run the prepare stage first") from error
    except DataError as error:
        raise DataError(f"damaged prepared data: {error}; delete it and rerun the prepare stage") from error
    if problem := _problem(arrays, path):
        raise DataError(f"{path}: damaged prepared data: {problem}; delete it and rerun the prepare stage")
    known = {name: arrays[name] for name in (*DTYPES, *EXTRA) if name in arrays}
    return Prepared(**known, classes=tuple(arrays["classes"].tolist()), data_hash=str(arrays["data_hash"]))


def _problem(arrays: Mapping[str, NDArray[Any]], path: Path) -> str | None:
    """How these arrays differ from what `save` writes, or None. Raises DataError where pixels are not in 0..255."""
    extra = EXTRA if set(EXTRA) & set(arrays) else {}
    if absent := {*DTYPES, *extra, "classes", "data_hash"} - set(arrays):
        return f"{', '.join(sorted(absent))} missing"
    for name, (dtype, dimensions) in (DTYPES | extra).items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != dimensions or not array.size:
            return f"{name} is {array.dtype} {array.shape}; {dtype} of {dimensions} dimensions is needed"
    images, labels, classes, data_hash = (arrays[name] for name in ("images", "labels", "classes", "data_hash"))
    if classes.dtype.kind != "U" or classes.ndim != 1 or len(set(classes.tolist())) < max(2, len(classes)):
        return f"classes is {classes.dtype} {classes.shape}; at least two different names are needed"
    if data_hash.dtype.kind != "U" or data_hash.ndim:
        return f"data_hash is {data_hash.dtype} {data_hash.shape}; a string is needed"
    if images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        return f"images have shape {images.shape}; (N, 1 or 3, size, size) is needed"
    if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() >= len(classes):
        return f"labels are {labels.shape} in {labels.min()}..{labels.max()}; {len(images)} in 0..{len(classes) - 1} are needed"
    if extra:
        more, of = arrays["extra_images"], arrays["extra_labels"]
        if more.shape[1:] != images.shape[1:] or of.shape != more.shape[:1] or of.min() < 0 or of.max() >= len(classes):
            return f"extra images {more.shape} and labels {of.shape} do not fit the images {images.shape} and their {len(classes)} classes"
    index = np.concatenate([arrays[name] for name in ("train", "validation", "test")])
    if index.min() < 0 or index.max() >= len(images) or len(np.unique(index)) < len(index):
        return f"indices of the splits must be distinct and in 0..{len(images) - 1}"
    mean = arrays["class_mean"]
    if mean.shape != (len(classes), *images.shape[1:]) or not (np.isfinite(mean).all() and mean.min() >= 0 and mean.max() <= 1):
        return f"class_mean has shape {mean.shape}; {(len(classes), *images.shape[1:])} in 0..1 is needed"
    check_range(images, str(path))
    if _data_hash(_hashes({name: arrays[name] for name in (*HASHED, *extra)})) != str(data_hash):
        return "its arrays do not match its data_hash"
    return None
