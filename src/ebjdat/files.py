"""Atomic writes, hashes and locks. Nothing that this package writes is ever seen half-written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # settings use this module too, and must not wait for NumPy
    from numpy.typing import ArrayLike


NOT_FINITE = "not_finite"  # in a JSON object: the names beside it whose value was NaN or infinite


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
    """JSON, which knows no NaN or infinity: they become null, and their names are listed under "not_finite" beside them."""
    write_text(path, json.dumps(_plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        lost = sorted(str(name) for name, part in value.items() if not _is_finite(part))
        return {name: _plain(part) for name, part in value.items()} | ({NOT_FINITE: lost} if lost else {})
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if _is_finite(value) else None


def _is_finite(value: Any) -> bool:
    """Whether a number is, and every number in a list."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def write_npz(path: Path | str, arrays: Mapping[str, ArrayLike]) -> None:
    """Arrays by name, none of them pickled."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # np.savez would add a suffix to a name
            np.savez(file, allow_pickle=False, **arrays)

    write_atomic(path, write)


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest(*parts: Any) -> str:
    """sha256 (hex) over files (Path: their content), bytes, and anything else as canonical JSON."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                data = hashlib.file_digest(file, "sha256").digest()
        elif isinstance(part, bytes):
            data = hashlib.sha256(part).digest()
        else:
            data = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest()
        total.update(data)
    return total.hexdigest()


@contextlib.contextmanager
def lock(path: Path | str, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock file, released also when the process dies. wait False: BlockingIOError when another has it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def git_commit() -> str:
    """Commit of the working folder, with "-dirty" when tracked files other than dvc.lock differ; "unknown" outside git.

    EBJDAT_COMMIT says it where the code was taken to a machine without its repository.
    """
    if told := os.environ.get("EBJDAT_COMMIT"):
        return told

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)*dvc.lock")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
