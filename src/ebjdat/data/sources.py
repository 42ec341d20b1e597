"""Data sources. Each takes the data settings and returns raw uint8 images with labels, or raises DataError. registry.SOURCES has a record
of each."""

from __future__ import annotations

import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat.data.decode import decode
from ebjdat.data.members import FILE_LIMIT, IMAGE_SUFFIXES, Member, ignored, members
from ebjdat.errors import DataError, few
from ebjdat.settings import DataSettings

DATA_LIMIT = 8 * 2**30  # bytes of all images, which are held in memory
CLASS_NAME_LIMIT = 255  # bytes, as in file systems
DARK = 17 << 8  # 16-bit images whose values are all lower (12-bit data, for instance) are nearly black in 8 bits
SPLITS = ("train", "test")
MISSING = (RuntimeError, OSError, EOFError, tarfile.TarError)  # raised by torchvision where a set is incomplete


@dataclass(frozen=True)
class Raw:
    """images: uint8 (N, C, H, W); labels: int64 (N,), indices into classes; test: bool (N,).

    ordered: whether the source's order is meaningful. reading: how files were read, for the data card.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test: NDArray[np.bool_]
    classes: tuple[str, ...]
    ordered: bool
    reading: Mapping[str, Any] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """How files were read, where that may surprise."""
        notes = [f"the folder {folder!r} is the {split} split" for split, folder in self.reading.get("folders", {}).items()]
        if self.reading.get("class_order") == "numeric" and list(self.classes) != sorted(self.classes):
            notes.append(f"classes are in numeric order ({', '.join(self.classes[:3])}, ...), not sorted as text")
        notes += [f"{n} images: {rule}" for rule, n in self.reading.get("converted", {}).items()]
        if self.reading.get("grey_stored_as_rgb"):
            notes.append("all images are grey but stored as RGB, so three equal channels")
        return notes

    def warnings(self) -> list[str]:
        """What was left out, and class names that are easily confused."""
        groups = defaultdict(list)
        for name in self.classes:
            groups["".join(name.casefold().split())].append(name)
        alike = [repr(name) for names in groups.values() if len(names) > 1 for name in names]
        warnings = [skipped_line(self.reading["skipped"])] if self.reading.get("skipped") else []
        return warnings + ([f"classes that differ only in case or spaces: {few(alike, 10)}"] if alike else [])


def digits(settings: DataSettings) -> Raw:
    """scikit-learn's 1,797 8x8 digits (values 0..16, scaled to 0..255); with a stratified test split of `settings.test` images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    labels = bunch.target.astype(np.int64)
    n, classes = len(labels), len(bunch.target_names)
    if not classes <= (settings.test or 0) <= n - classes:
        raise DataError(f"data.test is {settings.test}: allowed are {classes} (one per digit) to {n - classes}, of {n} images")
    _, test_index = train_test_split(np.arange(len(labels)), test_size=settings.test, stratify=labels, random_state=settings.split_seed)
    test = np.zeros(len(labels), bool)
    test[test_index] = True
    return Raw(images, labels, test, tuple(str(d) for d in range(10)), ordered=False)


def cifar10(settings: DataSettings, splits: Sequence[str] = SPLITS, download: bool = True) -> Raw:
    return _torchvision("CIFAR10", settings, splits, download)


def cifar100(settings: DataSettings, splits: Sequence[str] = SPLITS, download: bool = True) -> Raw:
    return _torchvision("CIFAR100", settings, splits, download)


def svhn(settings: DataSettings, splits: Sequence[str] = SPLITS, download: bool = True) -> Raw:
    return _torchvision("SVHN", settings, splits, download)


def _torchvision(name: str, settings: DataSettings, splits: Sequence[str], download: bool) -> Raw:
    """Splits of a torchvision set, which checks their checksums and downloads to `root` what is missing there."""
    try:
        parts = [torchvision_split(name, split, settings.root, download) for split in splits]
    except MISSING as error:
        help_ = (
            f" and could not be downloaded: {error}. Put the official archive there, set data.root to a folder that has it, "
            "or use source 'folder' with an archive of class folders."
        )
        raise DataError(f"{name} is missing or incomplete under {settings.root!r}{help_ if download else ''}") from error
    images, labels, classes = zip(*parts, strict=True)
    test = np.repeat([split == "test" for split in splits], [len(part) for part in labels])
    return Raw(np.concatenate(images), np.concatenate(labels), test, classes[0], ordered=True)


def torchvision_split(name: str, split: str, root: str, download: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Images uint8 (N, C, H, W), labels (N,) and class names of "train" or "test". Raises one of MISSING where it is not whole."""
    import torchvision.datasets

    choice = {"split": split} if name == "SVHN" else {"train": split == "train"}
    found = getattr(torchvision.datasets, name)(root=root, download=download, **choice)
    images = found.data if name == "SVHN" else found.data.transpose(0, 3, 1, 2)
    labels = found.labels if name == "SVHN" else found.targets
    classes = tuple(getattr(found, "classes", None) or map(str, range(10)))
    return np.ascontiguousarray(images, dtype=np.uint8), np.asarray(labels, dtype=np.int64), classes


# Longer than 60 lines: one pass over the files, whose refusals come in the order in which a reader would find them.
def folder(settings: DataSettings, splits: Sequence[str] = SPLITS) -> Raw:
    """Class folders, `train/<class>/<image>` and `test/<class>/<image>`, in a folder or an archive, also below one enclosing folder.

    Every file is read, refused (DataError), counted as skipped in `reading`, or junk as data.members defines it. All images must have
    one square size, or get it from `settings.size`. Images stay grey if all files store grey; otherwise all become RGB. Classes are in
    the order of `settings.classes`; else in numeric order if all names are digits; else sorted as text. splits: those that are read;
    with "train" alone any number of classes is allowed.
    """
    path = Path(settings.path or "")
    images: dict[str, dict[str, list[tuple[str, NDArray[np.uint8]]]]] = {split: defaultdict(list) for split in splits}
    tops: dict[str, str] = {}  # the folder that is each split
    skipped: dict[str, list[str]] = defaultdict(list)
    rules: Counter[str] = Counter()
    area = depth = highest = 0
    for member in members(path, settings.follow_links):
        if reason := ignored(member.name if not member.is_folder else f"{member.name}/x"):
            if not member.is_folder:
                skipped[reason].append(member.name)
            continue
        top, split, label, rest = _place(member)
        if split is None or split not in images:
            if not member.is_folder:
                skipped[f"outside {'/ and '.join(splits)}/"].append(member.name)
            continue
        where = f"{path}: {member.name!r}"
        if tops.setdefault(split, top) != top:
            raise DataError(f"{path}: two folders for the {split} split, {tops[split]!r} and {top!r}; only one is allowed")
        if member.problem is not None:
            raise DataError(f"{where} {member.problem}")
        if label is not None and not (label.isprintable() and label.strip() and len(label.encode()) <= CLASS_NAME_LIMIT):
            raise DataError(f"{where}: class names must be printable text of at most {CLASS_NAME_LIMIT} bytes; rename the folder {label!r}")
        if member.is_folder:
            if label is not None and not rest:
                images[split][label]  # register an empty class folder, which is refused below
            continue
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            skipped[repr(suffix)[1:-1] or "no suffix"].append(member.name)
            continue
        if label is None or len(rest) != 1:
            raise DataError(f"{where} is not train/<class>/<image> or test/<class>/<image>; move it or its folder")
        if member.size > FILE_LIMIT:
            raise DataError(f"{where} has {member.size:,} bytes; at most {FILE_LIMIT:,} are allowed")
        pixels = decode(member.read(), where, settings.size, settings.background, settings.channels)
        images[split][label].append((member.name, pixels.array))
        rules.update(pixels.rules)
        highest = max(highest, pixels.highest)
        area, depth = area + pixels.array[0].size, max(depth, len(pixels.array))
        if area * depth > DATA_LIMIT:  # one colour image makes all RGB
            raise DataError(f"{path}: images take more than {DATA_LIMIT:,} bytes as uint8, which is the limit; lower data.size")

    left_out = {kind: {"n": len(names), "example": names[0]} for kind, names in sorted(skipped.items())}
    if not any(images.values()):
        raise DataError(f"{path}: no {' or '.join(f'{split}/<class>/' for split in splits)} folders{_also(left_out)}")
    deep = sum(n for rule, n in rules.items() if rule.startswith("16-bit"))
    if deep and highest < DARK:
        raise DataError(
            f"{path}: its {deep} 16-bit images have no value above {highest}, so they would be (nearly) black in 8 bits; "
            "scale them to 0..65535, or store 8 bits"
        )
    classes, order = _ordered({c for of_split in images.values() for c in of_split}, settings.classes, path)
    reading = {"class_order": order, "skipped": left_out, "converted": dict(sorted(rules.items()))}
    folders = {split: top for split, top in tops.items() if PurePosixPath(top).name != split}
    return _assemble(path, images, classes, {**reading, **({"folders": folders} if folders else {})})


def _place(member: Member) -> tuple[str, str | None, str | None, tuple[str, ...]]:
    """(folder of the split, split, class, path below the class) of a member; None where it is in no split or class.

    Class names are in Unicode's composed form, whichever the file system uses.
    """
    parts = tuple(member.name.split("/"))
    at = next((i for i, part in enumerate(parts[:2]) if part.lower() in SPLITS), None)
    if at is None or (len(parts) == at + 1 and not member.is_folder):
        return "", None, None, ()
    top, below = "/".join(parts[: at + 1]), parts[at + 1 :]
    has_class = len(below) > 1 or (below and member.is_folder)
    return top, parts[at].lower(), unicodedata.normalize("NFC", below[0]) if has_class else None, below[1:]


def _also(skipped: Mapping[str, Mapping[str, Any]]) -> str:
    return f"; {skipped_line(skipped)}" if skipped else ""


def skipped_line(skipped: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: how many files were skipped, by kind, with an example of each."""
    n = sum(kind["n"] for kind in skipped.values())
    most = sorted(skipped.items(), key=lambda item: -item[1]["n"])
    kinds = [f"{kind['n']} {name} ({kind['example']!r})" for name, kind in most]
    return f"skipped {n} file{'s' if n > 1 else ''}: {few(kinds, 5)}"


def _ordered(found: set[str], given: Sequence[str] | None, path: Path) -> tuple[tuple[str, ...], str]:
    """Classes in the order of their labels, and what that order is."""
    if given is not None:
        given = [unicodedata.normalize("NFC", name) for name in given]  # like those of the folders
        absent, unknown = sorted(set(given) - found), sorted(found - set(given))
        if absent or unknown or len(set(given)) < len(given):
            raise DataError(
                f"{path}: data.classes must list every class folder once; without a folder: {few(map(repr, absent)) or 'none'}; "
                f"not listed: {few(map(repr, unknown)) or 'none'}"
            )
        return tuple(given), "given"
    if all(name.isascii() and name.isdigit() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name))), "numeric"
    return tuple(sorted(found)), "text"


def _assemble(
    path: Path, images: dict[str, dict[str, list[tuple[str, NDArray[np.uint8]]]]], classes: tuple[str, ...], reading: dict[str, Any]
) -> Raw:
    for split in images:
        empty = [c for c in classes if not images[split].get(c)]
        if empty:
            raise DataError(
                f"{path}: no images in {few(f'{split}/{c}' for c in empty)}; every class needs images in {' and '.join(images)}"
                + _also(reading["skipped"])
            )
    if len(classes) < 2 and len(images) > 1:
        raise DataError(f"{path}: only one class, {classes[0]!r}; at least two are needed")

    rows = [
        (image, index, split == "test", name)
        for split in images
        for index, c in enumerate(classes)
        for name, image in sorted(images[split].pop(c), key=lambda x: x[0])
    ]
    depth = max(len(image) for image, *_ in rows)  # grey pictures among colour ones (as in ImageNet) become RGB
    shapes = Counter((depth, *image.shape[1:]) for image, *_ in rows)
    usual = shapes.most_common(1)[0][0]
    for image, _, _, name in rows:
        if image.shape[1:] != usual[1:]:
            this = _size((depth, *image.shape[1:]))
            raise DataError(f"{path}: {name!r} is {this}, others are {_size(usual)}; all images must have one size, or set data.size")
    if usual[1] != usual[2] or usual[1] < 8:
        raise DataError(f"{path}: images are {_size(usual)}; they must be square with at least 8 pixels a side; set data.size to crop them")

    labels = np.array([row[1] for row in rows], dtype=np.int64)
    test = np.array([row[2] for row in rows], dtype=bool)
    together = np.empty((len(rows), *usual), np.uint8)
    for i in reversed(range(len(rows))):  # each image is released once it is copied
        together[i] = rows.pop()[0]
    if depth == 3 and (together[:, 0] == together[:, 1]).all() and (together[:, 0] == together[:, 2]).all():
        reading["grey_stored_as_rgb"] = True
    return Raw(together, labels, test, classes, ordered=False, reading=reading)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"


def check_range(images: NDArray[np.uint8], where: str) -> None:
    """Raises DataError if no pixel of uint8 images (or of their maxima) is above 1: they were divided by 255, or are masks."""
    if images.size and images.max() <= 1:
        raise DataError(
            f"{where}: no pixel is above {images.max()}; pixels in 0..255 are needed. Were they divided by 255 (then multiply again), "
            "or are they masks of 0 and 1?"
        )
