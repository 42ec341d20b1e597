"""Where images come from. A source takes the data settings and returns raw uint8 images with labels, or raises DataError."""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ebjdat.errors import UserError
from ebjdat.params import DataSettings

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
ARCHIVE_SUFFIXES = (".tar.xz", ".txz", ".tar.gz", ".tgz", ".zip")
MEMBER_LIMIT = 64 * 2**20  # bytes; no image file is that large, a decompression bomb is
SPLITS = ("train", "test")
MISSING = (RuntimeError, OSError, EOFError, tarfile.TarError)  # what torchvision raises where a set is not whole


class DataError(UserError):
    """The data cannot be used; says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Raw:
    """images: uint8 (N, C, H, W); labels: int64 (N,); test: bool (N,); ordered: whether the source's order means anything."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test: NDArray[np.bool_]
    classes: tuple[str, ...]
    ordered: bool


def digits(settings: DataSettings) -> Raw:
    """scikit-learn's 1,797 8x8 digits (values 0..16, scaled to 0..255); a stratified test split is drawn here."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    labels = bunch.target.astype(np.int64)
    if (settings.test or 0) < len(bunch.target_names):
        raise DataError(f"data.test is {settings.test}; at least one image for each of the {len(bunch.target_names)} digits is needed")
    _, test_index = train_test_split(np.arange(len(labels)), test_size=settings.test, stratify=labels, random_state=settings.split_seed)
    test = np.zeros(len(labels), bool)
    test[test_index] = True
    return Raw(images, labels, test, tuple(str(d) for d in range(10)), ordered=False)


def cifar10(settings: DataSettings) -> Raw:
    return _torchvision("CIFAR10", settings)


def cifar100(settings: DataSettings) -> Raw:
    return _torchvision("CIFAR100", settings)


def svhn(settings: DataSettings) -> Raw:
    return _torchvision("SVHN", settings)


def _torchvision(name: str, settings: DataSettings) -> Raw:
    """A torchvision set: its checksums are verified, and it is downloaded to `root` only when it is missing there."""
    images, labels = [], []
    classes: tuple[str, ...] = ()
    for split in SPLITS:
        try:
            found_images, found_labels, classes = torchvision_split(name, split, settings.root, download=True)
        except MISSING as error:
            raise DataError(
                f"{name} is not (whole) under {settings.root!r} and could not be fetched: {error}. Put the official archive there, "
                "set data.root to a folder that has it, or use source 'folder' with an archive of class folders."
            ) from error
        images.append(found_images)
        labels.append(found_labels)
    test = np.repeat([False, True], [len(labels[0]), len(labels[1])])
    return Raw(np.concatenate(images), np.concatenate(labels), test, classes, ordered=True)


def torchvision_split(name: str, split: str, root: str, download: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Images uint8 (N, C, H, W), labels (N,) and class names of "train" or "test". Raises one of MISSING where it is not whole."""
    import torchvision.datasets

    choice = {"split": split} if name == "SVHN" else {"train": split == "train"}
    found = getattr(torchvision.datasets, name)(root=root, download=download, **choice)
    images = found.data if name == "SVHN" else found.data.transpose(0, 3, 1, 2)
    labels = found.labels if name == "SVHN" else found.targets
    classes = tuple(getattr(found, "classes", None) or map(str, range(10)))
    return np.ascontiguousarray(images, dtype=np.uint8), np.asarray(labels, dtype=np.int64), classes


def folder(settings: DataSettings) -> Raw:
    """Class folders, `train/<class>/<image>` and `test/<class>/<image>`, in a folder or an archive of one.

    Archives are read in memory, member by member: nothing is unpacked to disk. Archives may have one enclosing folder.
    All images must have one square size, or get it from `settings.size`: the shorter side is scaled to it, the centre is
    cropped. Grey images stay grey where all are, everything else becomes RGB.
    """
    path = Path(settings.path or "")
    if not path.exists():
        raise DataError(f"{path}: there is no such folder or archive; set data.path")
    if path.is_dir():
        members = _folder_members(path)
    elif path.name.endswith(ARCHIVE_SUFFIXES):
        members = _zip_members(path) if path.suffix == ".zip" else _tar_members(path)
    else:
        raise DataError(f"{path}: a folder or an archive ending in {', '.join(ARCHIVE_SUFFIXES)} is allowed")

    images: dict[str, dict[str, list[tuple[str, NDArray[np.uint8]]]]] = {s: defaultdict(list) for s in SPLITS}
    for name, content in members:
        split, label, file = _place(path, name)
        if file is None:
            images[split][label]  # an empty class folder is seen, and refused below
        elif PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES:
            images[split][label].append((name, _decode(path, name, content, settings.size)))
    return _assemble(path, images)


def _place(path: Path, name: str) -> tuple[str, str, str | None]:
    """(split, class, file name or None for the class folder itself) of a member."""
    parts = PurePosixPath(name).parts
    at = next((i for i, part in enumerate(parts[:2]) if part in SPLITS), None)
    if at is None or len(parts) < at + 2 or len(parts) > at + 3:
        raise DataError(f"{path}: {name!r} is not train/<class>/<image> or test/<class>/<image>")
    return parts[at], parts[at + 1], parts[at + 2] if len(parts) > at + 2 else None


def _folder_members(path: Path) -> Iterator[tuple[str, bytes]]:
    inside = path.resolve()
    found = [p for split in SPLITS for p in sorted(path.glob(f"{split}/*")) + sorted(path.glob(f"{split}/*/*"))]
    if not found:
        raise DataError(f"{path}: has no train/<class>/ or test/<class>/ folders")
    for item in found:
        name = item.relative_to(path).as_posix()
        if any(part.startswith(".") for part in item.relative_to(path).parts):
            continue
        if not item.resolve().is_relative_to(inside):
            raise DataError(f"{path}: {name!r} leads out of the folder")
        yield name, b"" if item.is_dir() else item.read_bytes()


def _check_member(path: Path, name: str, size: int, is_link: bool) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or (parts and ":" in parts[0]):
        raise DataError(f"{path}: the member {name!r} leads out of the archive; it was not read")
    if is_link:
        raise DataError(f"{path}: the member {name!r} is a link or special file; only folders and image files are allowed")
    if size > MEMBER_LIMIT:
        raise DataError(f"{path}: the member {name!r} has {size:,} bytes; at most {MEMBER_LIMIT:,} are allowed")


def _skip(name: str) -> bool:
    """The root itself, hidden files, and folders above the classes."""
    parts = [p for p in PurePosixPath(name).parts if p != "."]
    return not parts or any(p.startswith((".", "__MACOSX")) for p in parts)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                _check_member(path, member.name, member.size, not (member.isfile() or member.isdir()))
                if _skip(member.name) or (member.isdir() and not _is_class_folder(member.name)):
                    continue
                file = archive.extractfile(member) if member.isfile() else None
                yield member.name, file.read() if file else b""
            while archive.fileobj and archive.fileobj.read(2**20):
                pass  # to the end, where a cut file is noticed and the checksum is compared
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{path}: the archive is corrupt or truncated ({error}); fetch it again") from error


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
                _check_member(path, member.filename, member.file_size, is_link)
                if _skip(member.filename) or (member.is_dir() and not _is_class_folder(member.filename)):
                    continue
                yield member.filename, b"" if member.is_dir() else archive.read(member)
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError, RuntimeError) as error:
        raise DataError(f"{path}: the archive is corrupt or truncated ({error}); fetch it again") from error


def _is_class_folder(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) >= 2 and parts[-2] in SPLITS


def _decode(path: Path, name: str, content: bytes, size: int | None) -> NDArray[np.uint8]:
    """(C, H, W) uint8; grey images keep one channel. size: scaled and cropped to that square (Pillow's ImageOps.fit)."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            grey = opened.mode in ("1", "L")
            image = opened.convert("L" if grey else "RGB")
            if size is not None:
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            array = np.asarray(image, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {name!r} is not a readable image ({error})") from error
    return array[None] if grey else array.transpose(2, 0, 1)


def _assemble(path: Path, images: dict[str, dict[str, list[tuple[str, NDArray[np.uint8]]]]]) -> Raw:
    classes = tuple(sorted(set(images["train"]) | set(images["test"])))
    for split in SPLITS:
        empty = [c for c in classes if not images[split].get(c)]
        if empty or not classes:
            raise DataError(
                f"{path}: no images in {', '.join(f'{split}/{c}' for c in empty) or split}; every class needs some in train and test"
            )
    if len(classes) < 2:
        raise DataError(f"{path}: only the class {classes[0]!r}; at least two are needed")

    depths = {image.shape[0] for split in SPLITS for c in classes for _, image in images[split][c]}
    if len(depths) > 1:  # grey pictures among colour ones, as ImageNet has them
        for split in SPLITS:
            for c in classes:
                images[split][c] = [(name, np.repeat(x, 3, 0) if len(x) == 1 else x) for name, x in images[split][c]]
    shapes = Counter(image.shape for split in SPLITS for c in classes for _, image in images[split][c])
    usual = shapes.most_common(1)[0][0]
    for split in SPLITS:
        for c in classes:
            for name, image in images[split][c]:
                if image.shape != usual:
                    raise DataError(
                        f"{path}: {name!r} is {_size(image.shape)}, others are {_size(usual)}; all images must be alike, or set data.size"
                    )
    if usual[1] != usual[2] or usual[1] < 8:
        raise DataError(f"{path}: images are {_size(usual)}; square ones of at least 8 pixels are allowed; set data.size to crop them")

    rows = [
        (image, index, split == "test")
        for split in SPLITS
        for index, c in enumerate(classes)
        for _, image in sorted(images[split][c], key=lambda x: x[0])
    ]
    return Raw(
        np.stack([r[0] for r in rows]),
        np.array([r[1] for r in rows], dtype=np.int64),
        np.array([r[2] for r in rows], dtype=bool),
        classes,
        ordered=False,
    )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"
