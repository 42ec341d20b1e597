"""The journal of a stage: a local file of JSON lines. Its first line says what it is about, its last line how the stage ended.

Journals are the record that tracking works from: a stage writes only here, which costs microseconds and needs no server;
`publish` brings them into MLflow. A finished journal lies beside the stage's results and is versioned with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ebjdat.files import write_text

UNFINISHED = Path("state/tracking")
SUFFIX = ".journal.jsonl"
LOCK_ATTEMPTS = 20  # a tenth of a second apart: a reader holds the lock for a moment, to see whether the writer lives
MAX_BYTES = 64 * 2**20  # typical journals have up to a few MB
MAX_LINES = 500_000


class Begin(BaseModel, strict=True):
    """The attempt that a journal is about. kind: "result" (an experiment's stage), "pretraining" or "report"."""

    run: str
    name: str
    seed: int
    stage: str
    kind: str
    id: str
    dvc_exp: str
    host: str


class Result(BaseModel, strict=True):
    """Everything that an experiment and seed has, as the report lists it. artifacts, model: a file's path and its sha256."""

    name: str
    seed: int
    tags: dict[str, str]
    metrics: dict[str, float]
    artifacts: list[dict[str, str]]
    model: dict[str, str] | None


class Event(BaseModel, strict=True):
    """A line of a journal: its time in ms, and what happened. The first line has begin, params, tags and data.

    sha256: of the file that the line names; in the last line of a finished journal, of all lines before it.
    """

    time: int
    begin: Begin | None = None
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    data: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None
    system: dict[str, float] | None = None
    final: dict[str, float] = {}
    step: int = 0
    tag: tuple[str, str] | None = None
    artifact: str = ""
    picture: str = ""
    png: str = ""
    model: str = ""
    sha256: str = ""
    result: Result | None = None
    resumed: bool = False
    given_up: bool = False
    end: Literal["FINISHED", "FAILED", "KILLED"] | None = None


class Writer:
    """Appends events to a journal, and locks the file, so that readers see that its writer lives.

    Cuts off a last line that a killed writer left incomplete. Raises BlockingIOError while another process writes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab+", buffering=0)  # unbuffered: close() must not retry a line that a full disk refused
        for attempt in range(1, LOCK_ATTEMPTS + 1):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == LOCK_ATTEMPTS:
                    self._file.close()
                    raise
                time.sleep(0.1)
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")[0]
        self._file.truncate(len(whole) + bool(whole))

    def write(self, **event: Any) -> None:
        """Raises OSError when only a part of the line could be written; readers ignore that part, the next writer cuts it off."""
        line = (json.dumps({"time": int(time.time() * 1000), **event}) + "\n").encode()
        if (written := self._file.write(line)) != len(line):
            raise OSError(f"{self.path}: {written} of {len(line)} bytes could be written")

    def close(self) -> None:
        self._file.close()


def read(path: Path, limit: int | None = None) -> list[Event]:
    """The events of a journal, or its first ones; without a last line that is incomplete.

    Raises ValueError that names the first invalid line, or says that a finished journal was changed.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size:,} bytes; {MAX_BYTES:,} are allowed")
    events: list[Event] = []
    before = hashlib.sha256()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(events) == limit or not line.endswith(b"\n"):
                break
            if number > MAX_LINES:
                raise ValueError(f"more than {MAX_LINES:,} lines, which is the limit")
            try:
                event = Event.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                raise ValueError(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
            if number == 1 and not {"begin", "params", "tags", "data"} <= event.model_fields_set:
                raise ValueError("line 1: does not say what it is about")
            if number > 1 and event.begin:
                raise ValueError(f"line {number}: begins again")
            if event.end and event.sha256 not in ("", before.hexdigest()):
                raise ValueError(f"line {number}: its sha256 does not match the lines before it")
            before.update(line)
            events.append(event)
    return events


def write_finished(journal: Path | None, status: str, path: Path) -> None:
    """Copy a journal to where finished ones lie, and seal its last line with the sha256 of those before it.

    The copy is empty where nothing could be journalled. Raises ValueError as `read` does.
    """
    text = ""
    if journal is not None and (events := read(journal)):
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)[: len(events) - bool(events[-1].end)]
        text = "".join(lines)
        text += json.dumps({"time": events[-1].time, "end": status, "sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n"
    write_text(path, text)


def is_written(path: Path) -> bool:
    """Whether the process that writes this journal lives."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # published and deleted by now
        pass
    return False


def unfinished(store: str = "") -> list[Path]:
    """Journals of stages that run, were killed, or are not published yet. store: only those meant for this one."""
    return sorted(path for path in (UNFINISHED / store).rglob(f"*{SUFFIX}") if path.is_file())


def finished() -> Iterator[Path]:
    """Journals beside results, also those that came with them from elsewhere."""
    for folder, _, names in os.walk("results"):
        yield from (path for name in sorted(names) if name.endswith(SUFFIX) and (path := Path(folder) / name).is_file())
