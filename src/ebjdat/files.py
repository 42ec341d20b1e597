"""Atomic writes, hashes and locks. Nothing that this package writes is ever seen half-written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # settings use this module too, and must not wait for NumPy
    from numpy.typing import ArrayLike

# What points git elsewhere than to the repository around a file; hooks set it.
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
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


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
    """Commit of the code that runs (`commit_of`). EBJDAT_COMMIT says it where the code was taken to a machine without its repository."""
    return os.environ.get("EBJDAT_COMMIT") or commit_of(Path(__file__).resolve().parent)


@cache
def commit_of(package: Path) -> str:
    """Commit of a package's files; "unknown" unless git tracks them, for instance in a source archive inside another repository.

    "-dirty" is added when tracked files of its checkout, other than dvc.lock, differ, or the package has files that git does
    not know. Where there is a repository but git does not read it, its reason is printed. Asked once per process.
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
            print(f"WARNING: results will not say which commit made them ({reason})", file=sys.stderr)
        return "unknown"
    return commit + ("-dirty" if changed else "")
