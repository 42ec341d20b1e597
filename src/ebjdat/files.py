"""Atomic writes, hashes and locks. Nothing that this package writes is ever seen half-written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebjdat.errors import DataError, UserError, brief

if TYPE_CHECKING:  # settings import this module and must not load NumPy
    from numpy.typing import ArrayLike, NDArray

DIRECTORY_LIMIT = 64 * 2**20  # bytes of a zip's list of members
MOST_ARRAYS = 10_000  # in an .npz
HEADER = 2**16  # bytes read for the header of an array in it
SMALL = 64 * 2**20  # bytes of a file's arrays that may expand by any factor
EXPANSION = 200  # highest compression factor; images and verdicts stay below it
LARGEST = 64 * 2**20  # bytes of a file that is read as a whole; real ones have thousands
DEEPEST = 50  # levels of nesting in JSON; real files have about ten


class FileError(UserError):
    """A file cannot be read. The message says which, why, and what to do."""


NOT_FINITE = "not_finite"  # in a JSON object: the names beside it whose value was NaN or infinite
DIGEST = "digest"
FILES = "files"  # in a result: name -> sha256 of what its stage wrote beside it

# Variables that point git to another repository than the one around a file; git hooks set them.
GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_PREFIX")


def write_atomic(path: Path | str, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path in the same folder)`, flush it to disk and move it onto `path`.

    On any error (a full disk, Ctrl-C) the temporary file is removed and `path` keeps its old content. Moving also keeps
    a hard link into the DVC cache from being written through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON. NaN and infinity become null, and their names are listed under "not_finite" beside them."""
    write_text(path, json.dumps(_plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_result(path: Path | str, values: Mapping[str, Any], made: Iterable[Path] | None = None) -> None:
    """Write a stage's result or a data card: JSON with a digest of its content.

    made: the stage's other files; the result holds the sha256 of those in the same folder.
    """
    content = {name: value for name, value in values.items() if name != DIGEST}
    if made is not None:
        content[FILES] = {file.name: _sha256(file) for file in made if file.parent.resolve() == Path(path).parent.resolve()}
    write_json(path, {**content, DIGEST: digest(_plain(content))})


def read_result(path: Path | str) -> dict[str, Any]:
    """Read what `write_result` wrote, without the digest.

    Raises FileError, also where its content, or an existing file beside it that it names, has changed since.
    """
    result = read_json(path)
    with reading(Path(path)):
        stated = result.pop(DIGEST, None)
        if stated is None:
            raise ValueError(f"no {DIGEST}, so from an earlier version")
        if stated != digest(result):
            raise ValueError(f"changed since it was written (its {DIGEST} does not match)")
        made = result.get(FILES, {})
        if not isinstance(made, dict):
            raise ValueError(f"{FILES} is {type(made).__name__}; names with their sha256 are needed")
        for name, sha256 in made.items():
            beside = Path(path).with_name(name)
            if beside.exists():
                with reading(beside, largest=None):
                    if _sha256(beside) != sha256:
                        raise FileError(
                            f"{beside}: changed since its stage wrote it (according to {Path(path).name}); restore it with "
                            f"`dvc checkout {beside}`, or delete it and rerun its stage"
                        )
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        lost = sorted(str(name) for name, part in value.items() if not _is_finite(part))
        return {name: _plain(part) for name, part in value.items()} | ({NOT_FINITE: lost} if lost else {})
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if _is_finite(value) else None


def _is_finite(value: Any) -> bool:
    """Whether a number, or every number in a list, is finite."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def write_npz(path: Path | str, arrays: Mapping[str, ArrayLike]) -> None:
    """Arrays by name, none of them pickled."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # np.savez would add a suffix to the name
            np.savez(file, allow_pickle=False, **arrays)

    write_atomic(path, write)


@contextlib.contextmanager
def reading(path: Path, largest: int | None = LARGEST) -> Iterator[None]:
    """A context in which to read and check a file: every error becomes a FileError that names it.

    Raises FileError at once for a file that is missing, not a regular file (a FIFO would hang), or larger than `largest` bytes.
    """
    try:
        if not path.exists():
            raise FileError(f"{path}: no such file; run the stage that makes it first")
        if not path.is_file():
            raise FileError(f"{path}: not a regular file; delete it and rerun its stage")
        if largest is not None and path.stat().st_size > largest:
            raise FileError(f"{path}: {path.stat().st_size:,} bytes; at most {largest:,} are allowed; delete it and rerun its stage")
        yield
    except UserError:
        raise
    except Exception as error:  # parsers raise anything on malformed bytes
        why = brief(f"{type(error).__name__}: {error}", 200)
        raise FileError(f"{path}: damaged or invalid ({why}); delete it and rerun its stage") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for anything else, and for nesting deeper than DEEPEST levels."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            below for above in level if isinstance(above, dict | list) for below in (above.values() if isinstance(above, dict) else above)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file. Raises FileError."""
    with reading(Path(path)):
        value = parse_json(Path(path).read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is needed, found {type(value).__name__}")
        return value


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a file written by `write_npz`: the named ones, or all. Raises FileError."""
    with reading(path, largest=None):
        try:
            arrays = arrays_of(path, names=names)
        except DataError as error:
            raise ValueError(str(error).removeprefix(f"{path}: ")) from error
        return {name: arrays[name] for name in names or arrays}


class ZipSource(io.BufferedReader):
    """A file for zipfile.ZipFile that raises DataError instead of reading a member list of more than `limit` bytes into memory."""

    def __init__(self, path: Path, limit: int = DIRECTORY_LIMIT) -> None:
        super().__init__(io.FileIO(path))
        self.path, self.limit, self.size = path, limit, path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self.size - self.tell())
        size = rest if size is None or size < 0 else min(size, rest)
        if size > self.limit:
            raise DataError(f"{self.path}: its member list has more than {self.limit:,} bytes, which is the limit")
        return super().read(size)


def names_of(path: Path | str) -> list[str]:
    """Names of the arrays in an .npz file. Raises as arrays_of."""
    with _npz(Path(path)) as (_, members):
        return list(members)


def arrays_of(path: Path | str, limit: int = 8 * 2**30, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz file by name: those of `names` that exist, or all. Pickled objects are refused.

    Raises FileNotFoundError, or DataError for any other file. Stated sizes are checked before memory is allocated: arrays of more
    than `limit` bytes in total, or of more than SMALL bytes that expand by more than EXPANSION times, are refused.
    """
    path = Path(path)
    with _npz(path) as (archive, members):
        wanted = {name: member for name, member in members.items() if names is None or name in names}
        if (total := sum(member.file_size for member in wanted.values())) > limit:
            raise DataError(f"{path}: its arrays have {total:,} bytes; at most {limit:,} are allowed")
        swollen = [member for member in wanted.values() if member.file_size > EXPANSION * member.compress_size]
        if (total := sum(member.file_size for member in swollen)) > SMALL:
            stored = sum(member.compress_size for member in swollen)
            some = "an array expands" if len(swollen) == 1 else f"{len(swollen)} arrays together expand"
            raise DataError(f"{path}: {some} from {stored:,} to {total:,} bytes; {EXPANSION} times is the limit")
        return {name: _read_npy(archive, member, f"{path}: {name[:80]!r}") for name, member in wanted.items()}


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """An open .npz file and its members by array name."""
    try:
        if not path.is_file():
            raise FileNotFoundError(path) if not path.exists() else DataError(f"{path}: is not a file")
        with ZipSource(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(members) > MOST_ARRAYS or len(set(names)) < len(names):
                raise DataError(f"{path}: has {len(members)} members; at most {MOST_ARRAYS} arrays with different names are allowed")
            yield archive, dict(zip(names, members, strict=True))
    except (FileNotFoundError, DataError):
        raise
    except Exception as error:  # libraries raise anything on malformed bytes
        raise DataError(f"{path}: not a readable .npz file ({str(error)[:200] or type(error).__name__})") from error


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    import numpy as np

    if not member.filename.endswith(".npy") or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is not a stored or deflated .npy member")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(HEADER))  # whatever length the header states
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(start)
    if version not in read:
        raise DataError(f"{where} has format version {version}; 1.0 and 2.0 are allowed")
    shape, _, dtype = read[version](start)
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects; plain numbers and text are allowed")
    size = dtype.itemsize * math.prod(shape)
    if any(n < 0 for n in shape) or start.tell() + size != member.file_size:
        raise DataError(f"{where} states shape {shape} of {dtype}, which does not match its size")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """sha256 (hex) of the content of files (Path), of bytes, and of anything else as canonical JSON."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            data = bytes.fromhex(_sha256(part))
        elif isinstance(part, bytes):
            data = hashlib.sha256(part).digest()
        else:
            data = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest()
        total.update(data)
    return total.hexdigest()


@contextlib.contextmanager
def lock(path: Path | str, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock file, which is released even if the process dies. wait False: raises BlockingIOError if it is held."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def git_commit() -> str:
    """Commit of the running code (`commit_of`), or EBJDAT_COMMIT, for code copied to a machine without its repository."""
    return os.environ.get("EBJDAT_COMMIT") or commit_of(Path(__file__).resolve().parent)


@cache
def commit_of(package: Path) -> str:
    """Commit of a package's files; "unknown" unless git tracks them (a source archive inside another repository, for instance).

    "-dirty" is added if tracked files of its checkout other than dvc.lock have changed, or the package has untracked files. If there
    is a repository that git cannot read, the reason is printed. Cached per process.
    """
    root = package.parents[1] if package.parent.name == "src" else package
    environment = {name: value for name, value in os.environ.items() if name not in GIT_PLACES}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", str(package / "__init__.py"))
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)*dvc.lock")
        changed = changed or git("ls-files", "--others", "--exclude-standard", "--", str(package))
    except (OSError, subprocess.CalledProcessError) as error:
        untracked = isinstance(error, subprocess.CalledProcessError) and error.returncode == 1
        if not untracked and any((place / ".git").exists() for place in package.parents):
            reason = " ".join(error.stderr.split()) if isinstance(error, subprocess.CalledProcessError) else "git is not installed"
            print(f"WARNING: results will not record their commit ({reason})", file=sys.stderr)
        return "unknown"
    return commit + ("-dirty" if changed else "")
