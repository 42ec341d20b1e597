"""A stage's history as lines of JSON in a local file: the first line says what it is about, the last one how it ended.

Journals are the truth of tracking: a stage only ever writes here, which costs microseconds and needs no server. `send`
brings them into MLflow. A finished one lies beside the stage's results and is versioned with them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebjdat.files import write_atomic

UNFINISHED = Path("state/tracking")
SUFFIX = ".journal.jsonl"


class Journal:
    """Appends events to a file, and holds a lock on it, by which readers see that its writer lives.

    A last line that a killed writer left incomplete is cut off. Raises BlockingIOError when another process writes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")[0]
        self._file.truncate(len(whole) + bool(whole))

    def write(self, **event: Any) -> None:
        line = json.dumps({"time": int(time.time() * 1000), **event}) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    def close(self, copy: Path | None = None) -> None:
        """Release the file, after it was copied to where finished ones lie."""
        with self._file:
            if copy is not None:
                self._file.seek(0)
                content = self._file.read()
                write_atomic(copy, lambda temporary: temporary.write_bytes(content))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; a line in the making is left out."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def is_written(path: Path) -> bool:
    """Whether the process that writes this journal lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def unfinished() -> list[Path]:
    """Journals that a stage still writes, that were killed, or that may not be sent yet."""
    return sorted(UNFINISHED.rglob(f"*{SUFFIX}"))


def finished() -> Iterator[Path]:
    """Journals beside results, also those that came with them from elsewhere."""
    for folder, _, names in os.walk("results"):
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(SUFFIX) and not name.startswith("."))
