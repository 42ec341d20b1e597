"""Folders and archives: the same tree gives the same members; damaged, lying and hostile ones are refused within bounds."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import socket
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ebjdat.files
from ebjdat.data import members, sources
from ebjdat.errors import DataError
from ebjdat.settings import DataSettings

from .conftest import ARCHIVES, KINDS, Files, as_folder, as_tar, as_zip, peak_below, picture, read, refusal, tree


@pytest.mark.parametrize("kind", ARCHIVES)
def test_members_outside_the_archive_are_refused(kind: str, tmp_path: Path, files: Files) -> None:
    for name in ("../evil.png", "train/../../evil.png", "/etc/evil.png", "train\\..\\..\\evil.png", "C:/evil.png"):
        path = KINDS[kind](tmp_path, {**files, name: picture(1)})
        assert "points outside the archive" in refusal(lambda path=path: read(path))
    assert [p.name for p in tmp_path.iterdir()] == [f"images.{kind}"]


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_archives_are_refused(kind: str, keep: float, tmp_path: Path, files: Files) -> None:
    path = KINDS[kind](tmp_path, files)
    content = path.read_bytes().rstrip(b"\0") if kind == "tar" else path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "corrupt or truncated" in refusal(lambda: read(path))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "zip"])
def test_damaged_archives_are_read_whole_or_refused(kind: str, tmp_path: Path, files: Files) -> None:
    """Random bits are flipped: only DataError is raised, and no image is dropped silently."""
    path, rng = KINDS[kind](tmp_path, files), np.random.default_rng(3)
    content = path.read_bytes()
    for _ in range(30):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with contextlib.suppress(DataError):
            raw = read(path)
            assert len(raw.images) + sum(kind["n"] for kind in raw.reading["skipped"].values()) == 24


def zip_change(marker: bytes, offset: int, change: int) -> Callable[[Path, Files], Path]:
    """A zip with a byte changed behind the first `marker`."""

    def make(path: Path, files: Files) -> Path:
        content = bytearray(as_zip(path, files).read_bytes())
        content[content.index(marker) + offset] ^= change
        path.write_bytes(content)
        return path

    return make


def lying_zip(method: int) -> Callable[[Path, Files], Path]:
    """The last member unpacks to 16 MB and states 1000 bytes."""

    def make(path: Path, files: Files) -> Path:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in {**files, "train/ant/last.png": bytes(16_000_000)}.items():
                archive.writestr(name, content)
        path.write_bytes(path.read_bytes().replace(struct.pack("<L", 16_000_000), struct.pack("<L", 1000)))
        return path

    return make


def zip_with_link(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(as_zip(path, files), "a") as archive:
        link = zipfile.ZipInfo("train/ant/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (zip_change(b"IDAT", 6, 0xFF), r"a\.zip: the archive is corrupt"),
        (zip_change(b"PK\1\2", 8, 1), r"'train/ant/00\.png' is encrypted"),
        (lying_zip(zipfile.ZIP_DEFLATED), "corrupt or truncated"),
        (lying_zip(zipfile.ZIP_BZIP2), "is compressed by method 12; stored and deflate are allowed"),
        (lying_zip(zipfile.ZIP_LZMA), "is compressed by method 14; stored"),
        (zip_with_link, r"'train/ant/link\.png' is a link or special file"),
    ],
    ids=["corrupt", "encrypted", "deflate bomb", "bzip2 bomb", "lzma bomb", "link"],
)
def test_broken_and_swollen_zips_are_refused(make: Callable[[Path, Files], Path], expected: str, tmp_path: Path, files: Files) -> None:
    path = make(tmp_path / "a.zip", files)
    with peak_below(4_000_000):
        assert re.search(expected, refusal(lambda: read(path)))


def test_a_zip_with_backslashes_has_folders_too(tmp_path: Path, files: Files) -> None:
    folders = {name.rpartition("/")[0] for name in files} | {"train", "test"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in {**{f"{folder}/": b"" for folder in sorted(folders)}, **files}.items():
            archive.writestr(name.replace("/", "\\"), content)
    raw = read(tmp_path / "a.zip")
    assert (raw.reading["skipped"], raw.images.shape) == ({}, (24, 3, 8, 8))


def header(kind: bytes, size: int, name: str = "train/ant/x", **more: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, more.get("linkname", "")
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(records: bytes) -> bytes:
    return header(tarfile.XHDTYPE, len(records)) + padded(records)


def negative(block: bytes) -> bytes:
    """A member of -1024 bytes, in base 256: a reader that trusts it goes back and never ends."""
    block = block[:124] + (-1024).to_bytes(12, "big", signed=True) + b" " * 12 + block[148:]
    block = block[:136] + b"0" * 11 + b"\0" + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


DIGITS = b"1000000 comment=" + b"1" * 999_983 + b"\n"  # quadratic time in tarfile
RECORD = pax(b"17 comment=aaaaa\n")
LONG = 3_000_000
END = bytes(1024)
BROKEN_TARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {  # change of a tar without its end marker
    "long name": (lambda tar: tar + header(tarfile.GNUTYPE_LONGNAME, LONG) + bytes(LONG), "names and headers exceed the limit"),
    "pax": (lambda tar: tar + header(tarfile.XHDTYPE, LONG) + bytes(LONG), "names and headers exceed the limit"),
    "first pax": (lambda tar: header(tarfile.XGLTYPE, LONG) + bytes(LONG), "names and headers exceed the limit"),
    "terabytes": (lambda tar: tar + header(b"0", 2**33 - 1, "train/ant/x.txt") * 3 + bytes(512), "unexpected end"),
    "more than the limit": (lambda tar: tar + header(b"0", 2**35, "notes.txt") + END, "unpacks to more than"),
    "records without end": (lambda tar: tar + RECORD * 900 + END, "corrupt or truncated"),
    "a record of digits": (lambda tar: tar + pax(DIGITS) + END, "corrupt or truncated"),
    "overlapping records": (lambda tar: tar + pax(b"2 " * 500_000 + b"=\n") + END, "invalid pax record"),
    "a record before it begins": (lambda tar: tar + pax(b"2 comment=a\n") + END, "invalid pax record"),
    "negative name": (lambda tar: tar + negative(header(tarfile.GNUTYPE_LONGNAME, 0)) + END, "negative size"),
    "negative size": (lambda tar: tar + negative(header(b"0", 0)) + END, "corrupt or truncated"),
    "sparse by a record": (lambda tar: tar + pax(b"25 GNU.sparse.major=1.00\n") + header(b"0", 0) + END, "has a sparse member"),
    "sparse": (lambda tar: tar + header(tarfile.GNUTYPE_SPARSE, 0) + END, "has a sparse member"),
    "fifo": (lambda tar: tar + header(tarfile.FIFOTYPE, 0) + END, "is a link or special file"),
    "link": (lambda tar: tar + header(tarfile.SYMTYPE, 0, linkname="/etc/passwd") + END, "is a link or special file"),
    "no end marker": (lambda tar: tar, "the end-of-archive marker is missing"),
    "broken header": (lambda tar: tar[:1024] + tar[1024:].replace(b"train", b"tra1n", 1) + END, "invalid header"),
    "a tar behind a tar": (lambda tar: tar + END + tar + END, "data follow the end-of-archive marker"),
    "duplicate": (lambda tar: tar + tar[:1024] + END, "duplicate member"),
    "long path": (
        lambda tar: tar + header(tarfile.GNUTYPE_LONGNAME, 1500) + padded(b"a" * 1500) + header(b"0", 0) + END,
        "has 1,500 characters; at most 1,000 are allowed",
    ),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["tar", "gz", "xz"])
@pytest.mark.parametrize("kind", BROKEN_TARS)
def test_broken_and_swollen_tars_are_refused(kind: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    whole = as_tar(tmp_path / "whole.tar", tree(picture), "w").read_bytes().rstrip(b"\0")
    change, expected = BROKEN_TARS[kind]
    path = tmp_path / "a.tar.gz"  # the format is that of the content
    path.write_bytes(compress(change(padded(whole))))
    with peak_below(20_000_000):
        assert expected in refusal(lambda: read(path))


@pytest.mark.parametrize(
    ("suffix", "limit", "value", "expected"),
    [
        *((suffix, "STREAM_LIMIT", 5_000_000, "unpacks to more than 5,000,000 bytes") for suffix in ("gz", "xz", "bz2")),
        *((suffix, "EXPANSION_FROM", 3_000_000, "unpacks to more than 200 times its size") for suffix in ("gz", "xz", "bz2")),
        ("xz", "XZ_MEMORY", 2**20, r"the archive is corrupt or truncated .*emory"),
        ("headers", "HEADERS_LIMIT", 12_000, r"exceed the limit \(1,048,576 bytes per member and 12,000 in total\)"),
        ("records", "RECORDS_LIMIT", 30, "has more than 30 pax records"),
        ("names", "COUNT_LIMIT", 24, "has more than 24 long-name and pax headers"),
        ("plain", "EXPANSION_FROM", 0, None),
    ],
)
def test_streams_are_bounded(
    suffix: str, limit: str, value: int, expected: str | None, tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed: several streams in one file, with zeros at the end. Each archive is read under the usual limits."""
    plain, tail = as_tar(tmp_path / "a.tar", files, "w").read_bytes(), bytes(3_000_000)
    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.get(suffix)
    before = {"records": pax(b"6 a=b\n" * 30 + DIGITS), "names": RECORD * 25}.get(suffix, b"")
    path = tmp_path / f"a.tar{f'.{suffix}' if compress else ''}"
    path.write_bytes(b"".join(map(compress, (plain, tail, tail))) if compress else before + plain)
    assert read(path).images.shape == (24, 3, 8, 8)
    monkeypatch.setattr(members, limit, value)
    if expected is None:
        assert read(path).images.shape == (24, 3, 8, 8)
    else:
        assert re.search(expected, refusal(lambda: read(path)))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_form_are_read(form: int, tmp_path: Path, files: Files) -> None:
    """Long names, names in UTF-8 and Latin-1, fractional times, sizes and comments in pax records."""
    more = {f"train/\u00e9/{'x' * 90}{i}.png": picture(i) for i in range(4)} | {f"test/\u00e9/{i}.png": picture(90 + i) for i in range(2)}
    records = {"comment": "9" * 5000, "LIBARCHIVE.xattr.user.x": "a=b\nc"}
    with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers={"comment": "all"}) as archive:
        for name, content in {**files, **more}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            member.pax_headers = {**records, "size": str(len(content))} if form == tarfile.PAX_FORMAT else {}
            archive.addfile(member, io.BytesIO(content))
    raw = read(tmp_path / "a.tar")
    assert raw.classes == ("ant", "bee", "cat", "\u00e9")
    assert np.array_equal(raw.images, read(as_folder(tmp_path / "images", {**files, **more})).images)


def test_numbers_and_sizes_of_files_are_bounded(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_folder(tmp_path / "images", files)
    for place, name, value, expected in (
        (members, "COUNT_LIMIT", 20, "has more than 20 files and folders"),
        (sources, "FILE_LIMIT", 50, "bytes; at most 50 are allowed"),
        (sources, "DATA_LIMIT", 1000, "images take more than 1,000 bytes"),
    ):
        with monkeypatch.context() as limits:
            limits.setattr(place, name, value)
            assert expected in refusal(lambda: read(path))
    with (path / "train/ant/notes.txt").open("wb") as file:
        file.truncate(2**40)  # a sparse file of a terabyte that is not an image: counted, not read
    assert read(path).reading["skipped"][".txt"]["n"] == 1
    monkeypatch.setattr(ebjdat.files.ZipSource.__init__, "__defaults__", (500,))  # its limit
    assert "its member list has more than 500 bytes" in refusal(lambda: read(as_zip(tmp_path / "a.zip", files)))


# Links and special files in folders


def special(kind: str, path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
            server.bind(path.name)
    elif kind == "not UTF-8":
        path.with_name(os.fsdecode(b"\xff.png")).write_bytes(picture(1))
    else:
        path.symlink_to({"device": "/dev/zero", "broken": "none.png", "loop": path.name, "parent": path.parents[2]}[kind])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fifo", "is a FIFO; only folders and files are allowed"),
        ("socket", "is a socket; only"),
        ("device", "is a device; only"),
        ("broken", "is a broken link"),
        ("loop", "is a broken link"),
        ("parent", "is a link to one of its parent folders"),
        ("not UTF-8", "has a name that is not UTF-8"),
    ],
)
@pytest.mark.parametrize("follow", [False, True])
def test_special_files_are_refused_and_never_waited_for(kind: str, expected: str, follow: bool, tmp_path: Path, files: Files) -> None:
    path = as_folder(tmp_path / "images", files)
    special(kind, path / "train/ant/x.png")
    assert expected in refusal(lambda: read(path, follow_links=follow))


def test_links_are_followed_where_the_settings_allow_it_or_into_the_dvc_cache(
    tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def linked(name: str, store: Path) -> Path:
        for i, (file, content) in enumerate(files.items()):
            as_folder(store, {str(i): content})
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).symlink_to(store / str(i))
        return tmp_path / name

    expected = read(as_folder(tmp_path / "plain", files)).images
    config = b"[core]\n    no_scm = true\n    analytics = false\n[cache]\n    dir = ../store\n    type = symlink\n"
    as_folder(tmp_path, {".dvc/config": config})
    monkeypatch.chdir(tmp_path)
    members.dvc_cache.cache_clear()
    assert np.array_equal(read(linked("cached", tmp_path / "store/files/md5/00")).images, expected)
    elsewhere = linked("linked", tmp_path / "elsewhere")
    assert "is a link to outside the folder and DVC's cache; set data.follow_links: true" in refusal(lambda: read(elsewhere))
    assert np.array_equal(read(elsewhere, follow_links=True).images, expected)
    members.dvc_cache.cache_clear()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("train/ant/00.png", "'train/ant/00.png' cannot be read (Permission denied"), ("train/ant", "the folder 'train/ant'")],
)
def test_unreadable_folders_and_files_are_refused(name: str, expected: str, files: Files) -> None:
    """As another user if the tests run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as place:
        path, user = as_folder(Path(place) / "images", files), os.geteuid()
        os.chmod(place, 0o755)
        (path / name).chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)
            assert expected in refusal(lambda: read(path))
        finally:
            os.seteuid(user)
            (path / name).chmod(0o755)


@pytest.mark.parametrize("path", ["x" * 5000, "nul\0byte", "none"])
def test_impossible_paths_are_refused(path: str) -> None:
    asked = DataSettings(source="folder", path="x", validation=3).model_copy(update={"path": path})
    assert "there is no such folder or archive" in refusal(lambda: sources.folder(asked))
