"""Entries of a folder or an archive of images: the same tree gives the same members, read in pieces and within limits.

Nothing is unpacked to disk, links are followed only where the settings allow it, and stated sizes are not trusted: memory stays
within the limits below whatever the input.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from ebjdat.errors import DataError
from ebjdat.files import EXPANSION, ZipSource

ARCHIVE_SUFFIXES = (".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar", ".zip")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}

FILE_LIMIT = 64 * 2**20  # bytes of an image file
COUNT_LIMIT = 400_000  # files and folders
STREAM_LIMIT = 16 * 2**30  # bytes of an unpacked tar, including padding
EXPANSION_FROM = 2**30  # bytes of an unpacked tar above which it may be at most EXPANSION times the file
HEADER_LIMIT = 2**20  # bytes of headers before a member of a tar: long names and pax records
HEADERS_LIMIT = 2**30  # bytes of headers in total; 400,000 members with pax records have 0.6 GB
RECORDS_LIMIT = 4_000_000  # pax records in total
NAME_LIMIT = 1000  # characters of a path
XZ_MEMORY = 256 * 2**20  # bytes that the .xz decoder may use; `xz -9` needs 65 MiB
PIECE = 2**20

# Lower-case names of what operating systems leave beside files. Images inside are copies, previews or deleted ones, never a class.
JUNK = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "system volume information", "lost+found"),
    *("@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", ".git", ".svn", ".hg", ".dvc", ".ds_store", ".appledouble"),
    *(".trashes", ".trash-1000", ".spotlight-v100", ".fseventsd", ".temporaryitems", ".thumbnails", ".ipynb_checkpoints"),
}
IGNORED = {"cvs", "__pycache__"}  # like names that begin with a dot: left out, but images inside are reported
PAPERS = {"readme", "license", "licence", "copying", "notice", "authors", "citation", "changelog"}  # documents that come with a data set
PAPER_SUFFIXES = {"", ".md", ".txt", ".rst", ".html", ".pdf"}

CORRUPT = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error, OSError, struct.error),
    *(ValueError, LookupError, RuntimeError, MemoryError, OverflowError),  # raised by malformed or too deeply nested headers
)


@dataclass(frozen=True)
class Member:
    """An entry of the tree. name: its path below the root, parts joined by "/"; size: its stated size in bytes.

    problem: why it cannot be read ("is a FIFO; ..."), or None. read: returns a file's content, at most `size` bytes; in an archive
    only until the next member is requested.
    """

    name: str
    is_folder: bool
    size: int = 0
    problem: str | None = None
    read: Callable[[], bytes] = bytes


def members(path: Path, follow_links: bool = False) -> Iterator[Member]:
    """Every entry of a folder or archive that is not junk. Raises DataError unless all of it can be read."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r}: there is no such folder or archive ({_reason(error)})") from error
    name = path.name.lower()
    if stat.S_ISDIR(mode):
        found = _of_folder(path, follow_links)
    elif stat.S_ISREG(mode) and name.endswith(ARCHIVE_SUFFIXES):
        found = _of_archive(path, _of_zip if name.endswith(".zip") else _of_tar)
    else:
        raise DataError(f"{path}: must be a folder or an archive ending in {', '.join(ARCHIVE_SUFFIXES)}")
    for n, member in enumerate(found, 1):
        if n > COUNT_LIMIT:
            raise DataError(f"{path}: has more than {COUNT_LIMIT:,} files and folders, which is the limit")
        if not is_junk(member.name, member.is_folder):
            yield member


def is_junk(name: str, is_folder: bool) -> bool:
    """Whether an entry is silently left out. An image is only when it is in JUNK or a macOS companion file (`._*`)."""
    parts = name.lower().split("/")
    if not name or any(part.startswith("._") or part in JUNK for part in parts):
        return True
    suffix = PurePosixPath(parts[-1]).suffix
    if is_folder or suffix in IMAGE_SUFFIXES:
        return False
    return ignored(name) is not None or (parts[-1].split(".")[0] in PAPERS and suffix in PAPER_SUFFIXES)


def ignored(name: str) -> str | None:
    """Why an image of this name is skipped (and reported), or None."""
    *above, last = name.lower().split("/")
    if any(part.startswith(".") or part in IGNORED for part in above):
        return "in an ignored folder"
    return "whose name begins with a dot" if last.startswith(".") else None


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _of_folder(root: Path, follow_links: bool) -> Iterator[Member]:
    inside = os.path.realpath(root)
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (inside,))]  # (name below the root, real paths of it and of its parents)
    while waiting:
        name, above = waiting.pop()
        try:
            with os.scandir(root / name) as entries:
                found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            if ignored(f"{name}/x"):
                continue
            raise DataError(f"{root}: the folder {name or '.'!r} cannot be read ({_reason(error)})") from error
        below = []
        for last, is_folder in found:
            inner = f"{name}/{last}" if name else last
            if is_junk(inner, is_folder):
                continue
            member, real = _entry(root, inner, inside, follow_links)
            if member.is_folder and member.problem is None:
                if real in above:
                    raise DataError(f"{root}: {inner!r} is a link to one of its parent folders")
                below.append((inner, (*above, real)))
            yield member
        waiting += reversed(below)


def _entry(root: Path, name: str, inside: str, follow_links: bool) -> tuple[Member, str]:
    """A member of a folder, and its real path."""
    path = root / name
    is_link = path.is_symlink()
    try:
        name.encode()
        real = os.path.realpath(path, strict=True)
        status = path.stat()
    except UnicodeEncodeError:
        return Member(name, False, problem="has a name that is not UTF-8; rename it"), ""
    except OSError as error:
        why = "is a broken link" if is_link else "cannot be read"
        return Member(name, False, problem=f"{why} ({_reason(error)})"), ""
    problem, is_folder = None, stat.S_ISDIR(status.st_mode)
    if not is_folder and not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        problem = f"is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}; only folders and files are allowed"
    elif is_link and not (follow_links or _is_within(real, [inside]) or _is_within(real, dvc_cache())):
        problem = "is a link to outside the folder and DVC's cache; set data.follow_links: true to allow it"
    return Member(name, is_folder, status.st_size, problem, partial(_read_file, root, name)), real


def _is_within(path: str, folders: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _read_file(root: Path, name: str) -> bytes:
    try:
        with (root / name).open("rb") as file:
            return file.read(FILE_LIMIT)
    except OSError as error:
        raise DataError(f"{root}: {name!r} cannot be read ({_reason(error)})") from error


@cache
def dvc_cache() -> tuple[str, ...]:
    """The real path of the DVC cache of the current repository, as DVC reports it; empty if there is none."""
    asked = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    lines = asked.stdout.strip().splitlines()
    return (os.path.realpath(lines[-1]),) if asked.returncode == 0 and lines else ()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        raise DataError(f"{path}: the archive cannot be read ({error}); repack it") from error
    except CORRUPT as error:
        raise DataError(f"{path}: the archive is corrupt or truncated ({_reason(error)}); download it again") from error


def _of_archive(path: Path, read: Callable[[Path], Iterator[Member]]) -> Iterator[Member]:
    seen: set[str] = set()
    with _whole(path):
        for member in read(path):
            if len(member.name) > NAME_LIMIT:
                raise DataError(f"{path}: '{member.name[:40]}...' has {len(member.name):,} characters; at most {NAME_LIMIT:,} are allowed")
            parts = member.name.replace("\\", "/").split("/")
            if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
                raise DataError(f"{path}: member {member.name!r} points outside the archive")
            name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
            if not member.is_folder and name in seen:
                raise DataError(f"{path}: duplicate member {name!r}; repack it")
            seen.add(name)
            problem = member.problem or (None if _is_utf8(name) else "has a name that is not UTF-8; rename it")
            yield Member(name, member.is_folder, member.size, problem, partial(_read_member, path, member))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_member(path: Path, member: Member) -> bytes:
    with _whole(path):
        content = member.read()
        if len(content) < member.size:
            raise EOFError(f"{member.name!r} is truncated")
        return content


def _of_zip(path: Path) -> Iterator[Member]:
    with ZipSource(path) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            problem = None
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                problem = "is a link or special file; only folders and files are allowed"
            elif info.flag_bits & 1:
                problem = "is encrypted; repack it without a password"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # other methods unpack without a bound
                problem = f"is compressed by method {info.compress_type}; stored and deflate are allowed"
            name = info.filename.replace("\\", "/")  # written by some Windows programs
            yield Member(name, name.endswith("/"), info.file_size, problem, partial(_of_zip_member, archive, info))


def _of_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    data = bytearray()
    with archive.open(info) as file:
        while len(data) < info.file_size and (piece := file.read(min(PIECE, info.file_size - len(data)))):
            data += piece
    return bytes(data)


class _Xz(io.RawIOBase):
    """The content of an .xz file with all its streams, decoded in bounded memory, which lzma.open cannot do."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.waiting = file, b""
        self.decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.decoder.eof:
                rest = self.decoder.unused_data.lstrip(b"\0")  # zeros may pad the gap between streams
                while not rest:
                    if not (piece := self.file.read(PIECE)):
                        return 0
                    rest = piece.lstrip(b"\0")
                self.decoder, self.waiting = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY), rest
            if self.decoder.needs_input and not self.waiting:
                self.waiting = self.file.read(PIECE)
                if not self.waiting:
                    raise EOFError("truncated stream")
            data = self.decoder.decompress(self.waiting, len(buffer))
            self.waiting = b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def _unpacked(file: BinaryIO) -> BinaryIO:
    """The decompressed content of a tar file. Its first bytes decide the format, not its name."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(file))
    if start == b"\xfd7zXZ\0":
        return cast(BinaryIO, io.BufferedReader(_Xz(file), PIECE))
    return file


PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]{1,1000})=")
PAX_NEEDED = (b"path", b"size", b"hdrcharset")


class _Header(tarfile.TarInfo):
    """A header that announces to the stream what follows, before tarfile reads on."""

    def _proc_member(self, archive: Any) -> Any:
        archive.fileobj.follows(self)
        return super()._proc_member(archive)  # type: ignore[misc]


class _TarStream:
    """The forward-only stream that tarfile reads: at most HEADER_LIMIT bytes of headers before a member and STREAM_LIMIT in total.

    It passes on only the pax records in PAX_NEEDED: overlapping records and long rows of digits cost tarfile quadratic time and
    memory.
    """

    def __init__(self, path: Path, file: BinaryIO, source: BinaryIO) -> None:
        self.path, self.file, self.source = path, file, source  # source: the decompressed file
        self.at = self.headers = self.all_headers = 0  # bytes read; bytes of headers since the last member, and in total
        self.extra = self.records = 0  # long-name and pax headers; pax records
        self.pax: int | None = None  # bytes of pax records that tarfile reads next
        self.last = b""  # what tarfile read last

    def follows(self, header: tarfile.TarInfo) -> None:
        """Called with each header, before what follows it is read."""
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise self._sparse()
        if header.type in (*PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            self.extra += 1
            self.pax = header.size if header.type in PAX else None
        if self.extra > COUNT_LIMIT:
            raise DataError(f"{self.path}: has more than {COUNT_LIMIT:,} long-name and pax headers, which is the limit")

    def _sparse(self) -> DataError:
        return DataError(f"{self.path}: has a sparse member; repack it without sparse files")

    def needed(self, body: bytes) -> bytes:
        """The pax records that a reader needs. Raises tarfile.ReadError unless each begins where the previous one ends."""
        kept, at = {}, 0
        while at < len(body):
            found = PAX_RECORD.match(body, at)
            end = at + int(found[1]) if found else 0
            if found is None or end <= found.end() or body[end - 1 : end] != b"\n":
                raise tarfile.ReadError("invalid pax record")
            self.records += 1
            if self.records > RECORDS_LIMIT:
                raise DataError(f"{self.path}: has more than {RECORDS_LIMIT:,} pax records, which is the limit")
            if found[2].startswith(b"GNU.sparse."):
                raise self._sparse()
            if found[2] in PAX_NEEDED:
                kept[found[2]] = body[at:end]
            at = end
        return b"".join(kept.values()) + bytes(tarfile.BLOCKSIZE)

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> None:
        if at > STREAM_LIMIT:
            raise DataError(f"{self.path}: unpacks to more than {STREAM_LIMIT:,} bytes, which is the limit")
        while self.at < at and self.take(min(PIECE, at - self.at)):
            pass
        if self.at != at:
            raise tarfile.ReadError("unexpected end of data")

    def read(self, size: int) -> bytes:
        if size < 0:
            raise tarfile.ReadError("negative size")
        self.headers += size
        self.all_headers += size
        if self.headers > HEADER_LIMIT or self.all_headers > HEADERS_LIMIT:
            limits = f"{HEADER_LIMIT:,} bytes per member and {HEADERS_LIMIT:,} in total"
            raise DataError(f"{self.path}: names and headers exceed the limit ({limits})")
        self.last = self.take(size)
        pax, self.pax = self.pax, None
        return self.last if pax is None else self.needed(self.last[:pax])

    def take(self, size: int) -> bytes:
        """The next bytes; fewer only at the end."""
        if self.at + size > STREAM_LIMIT:
            raise DataError(f"{self.path}: unpacks to more than {STREAM_LIMIT:,} bytes, which is the limit")
        data = bytearray()
        while len(data) < size and (piece := self.source.read(min(PIECE, size - len(data)))):
            data += piece
        self.at += len(data)
        if self.at > EXPANSION_FROM and self.at > EXPANSION * self.file.tell():
            raise DataError(f"{self.path}: unpacks to more than {EXPANSION} times its size, which is the limit")
        return bytes(data)

    def end(self) -> None:
        """Read to the end, which finds truncation and wrong checksums. tarfile stops silently at an invalid header."""
        if not self.last or self.last.strip(b"\0"):
            raise tarfile.ReadError("invalid header" if self.last else "the end-of-archive marker is missing")
        while piece := self.take(PIECE):
            if piece.strip(b"\0"):
                raise tarfile.ReadError("data follow the end-of-archive marker")


def _of_tar(path: Path) -> Iterator[Member]:
    with path.open("rb") as file, closing(_unpacked(file)) as source:
        stream = _TarStream(path, file, source)
        with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:", tarinfo=_Header) as archive:
            while (info := archive.next()) is not None:
                stream.headers = 0
                plain = info.isdir() or info.isfile()
                problem = None if plain else "is a link or special file; only folders and files are allowed"
                yield Member(info.name, info.isdir(), info.size, problem, partial(stream.take, info.size))
                info.name, info.linkname, info.pax_headers = "", "", {}  # tarfile keeps every member it has read
                archive.pax_headers = {}
        stream.end()
