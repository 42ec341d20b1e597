"""Small image data sets as folders and archives, written by the standard library."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from ebjdat.data import sources
from ebjdat.data.sources import Raw
from ebjdat.errors import DataError
from ebjdat.settings import DataSettings

Files = dict[str, bytes]


def saved(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    memory = io.BytesIO()
    image.save(memory, kind, **how)
    return memory.getvalue()


def picture(value: int, size: int = 8, mode: str = "RGB", kind: str = "PNG") -> bytes:
    return saved(Image.new(mode, (size, size), value if mode == "L" else (value, 0, 255 - value)), kind)


def grey(value: int) -> bytes:
    return picture(value, mode="L")


def tree(image: Callable[[int], bytes], n: int = 4, classes: str = "ab") -> Files:
    """n images in each split of each class, made from their number."""
    return {f"{split}/{label}/{i}.png": image(i) for split in ("train", "test") for label in classes for i in range(n)}


@pytest.fixture
def files() -> Files:
    """Three classes, 6 training and 2 test images each; every image has a colour of its own."""
    return {
        f"{split}/{label}/{i:02d}.png": picture(k * 50 + i + offset)
        for k, label in enumerate(("ant", "bee", "cat"))
        for split, n, offset in (("train", 6, 0), ("test", 2, 20))
        for i in range(n)
    }


def as_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def as_tar(path: Path, files: Files, mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


KINDS: dict[str, Callable[[Path, Files], Path]] = {
    "folder": lambda tmp, files: as_folder(tmp / "images", files),
    "tar": lambda tmp, files: as_tar(tmp / "images.tar", files, "w"),
    "tar.xz": lambda tmp, files: as_tar(tmp / "images.tar.xz", files),
    "tar.gz": lambda tmp, files: as_tar(tmp / "images.tar.gz", files, "w:gz"),
    "tar.bz2": lambda tmp, files: as_tar(tmp / "images.tar.bz2", files, "w:bz2"),
    "zip": lambda tmp, files: as_zip(tmp / "images.zip", files),
}
ARCHIVES = [kind for kind in KINDS if kind != "folder"]
THREE = ("folder", "tar.xz", "zip")  # one of each reader


def settings(path: Path, **more: object) -> DataSettings:
    return DataSettings.model_validate({"source": "folder", "path": str(path), "validation": 3, **more})


def read(path: Path, **more: object) -> Raw:
    return sources.folder(settings(path, **more))


def refusal(call: Callable[[], object]) -> str:
    """The message of the DataError that a call raises: one printable line."""
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)


@contextlib.contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Bytes that Python's allocators hand out meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
