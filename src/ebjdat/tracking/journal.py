"""A stage's history as lines of JSON in a local file: the first line says what it is about, the last one how it ended.

Journals are the truth of tracking: a stage only ever writes here, which costs microseconds and needs no server. `send`
brings them into MLflow. A finished one lies beside the stage's results and is versioned with them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebjdat.files import write_text

UNFINISHED = Path("state/tracking")
SUFFIX = ".journal.jsonl"
PATIENCE = 20  # tenths of a second that a journal's lock is tried


class Journal:
    """Appends events to a file, and holds a lock on it, by which readers see that its writer lives.

    A last line that a killed writer left incomplete is cut off. Raises BlockingIOError when another process writes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab+", buffering=0)  # a line that a full disk refused must not be tried again by close()
        for attempt in range(PATIENCE):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # or only a reader, who asks whether the writer lives
                if attempt + 1 == PATIENCE:
                    self._file.close()
                    raise
                time.sleep(0.1)
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")[0]
        self._file.truncate(len(whole) + bool(whole))

    def write(self, **event: Any) -> None:
        """Raises OSError when not the whole line could be written; the rest of it is left out by readers, cut off by a next writer."""
        line = (json.dumps({"time": int(time.time() * 1000), **event}) + "\n").encode()
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: {written} of {len(line)} bytes could be written")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; a line in the making is left out."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def write_finished(events: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A whole journal where finished ones lie; without events (nothing could be journalled) an empty file."""
    write_text(path, "".join(json.dumps(event) + "\n" for event in events))


def is_written(path: Path) -> bool:
    """Whether the process that writes this journal lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def unfinished(store: str = "") -> list[Path]:
    """Journals that a stage still writes, that were killed, or that may not be sent yet. store: only those meant for this one."""
    return sorted((UNFINISHED / store).rglob(f"*{SUFFIX}"))


def finished() -> Iterator[Path]:
    """Journals beside results, also those that came with them from elsewhere."""
    for folder, _, names in os.walk("results"):
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(SUFFIX))
