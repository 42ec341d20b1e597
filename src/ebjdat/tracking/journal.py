"""A stage's history as lines of JSON in a local file: the first line says what it is about, the last one how it ended.

Journals are the truth of tracking: a stage only ever writes here, which costs microseconds and needs no server. `send`
brings them into MLflow. A finished one lies beside the stage's results and is versioned with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ebjdat.files import parse_json, write_text

UNFINISHED = Path("state/tracking")
SUFFIX = ".journal.jsonl"
SEAL = "sha256"  # in the last line of a finished one: of the lines before it
PATIENCE = 20  # tenths of a second that a journal's lock is tried
LARGEST = 64 * 2**20  # bytes of a journal that is read; ours have a few millions
MOST_EVENTS = 500_000  # and lines


class Begin(BaseModel, strict=True):
    """Whose journal it is."""

    run: str
    name: str
    seed: int
    stage: str
    kind: str
    id: str
    dvc_exp: str
    host: str


class Artifact(BaseModel, strict=True):
    artifact: str
    sha256: str


class Model(BaseModel, strict=True):
    model: str
    sha256: str


class Result(BaseModel, strict=True):
    name: str
    seed: int
    tags: dict[str, str]
    metrics: dict[str, float]
    artifacts: list[Artifact]
    model: Model | None


class Event(BaseModel, strict=True):
    """A line of a journal: its time in ms, and one of the others (the first line: those from begin to data)."""

    time: int
    begin: Begin | None = None
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    data: dict[str, Any] | None = None
    metrics: dict[str, float] = {}
    system: dict[str, float] = {}
    final: dict[str, float] = {}
    step: int = 0
    tag: list[str] = ["", ""]
    artifact: str = ""
    picture: str = ""
    png: str = ""
    model: str = ""
    sha256: str = ""
    result: Result | None = None
    end: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"


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


def read(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The events of a journal, or its first ones; a line in the making is left out.

    Raises ValueError that says which line is none of a journal, or that a finished one is not as it was written.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.stat().st_size:,} bytes; {LARGEST:,} are allowed")
    events: list[dict[str, Any]] = []
    before = hashlib.sha256()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(events) == most or not line.endswith(b"\n"):
                break
            if number > MOST_EVENTS:
                raise ValueError(f"more than {MOST_EVENTS:,} lines, which is the limit")
            event = _event(line, number)
            if "end" in event and event.get(SEAL, before.hexdigest()) != before.hexdigest():
                raise ValueError(f"line {number}: its {SEAL} is of other lines than those before it")
            before.update(line)
            events.append(event)
    return events


def _event(line: bytes, number: int) -> dict[str, Any]:
    try:
        event: dict[str, Any] = parse_json(line)
        Event.model_validate(event)
    except ValidationError as error:
        one = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"line {number}: {'.'.join(map(str, one['loc']))}: {one['msg']}") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if number == 1 and not {"begin", "params", "tags", "data"} <= event.keys():
        raise ValueError("line 1: does not say what it is about")
    if number > 1 and "begin" in event:
        raise ValueError(f"line {number}: begins again")
    return event


def write_finished(events: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A whole journal where finished ones lie, its last line with the sha256 of those before it; without events (nothing could be
    journalled) an empty file."""
    text = "".join(json.dumps(event) + "\n" for event in events[:-1])
    for last in events[-1:]:
        text += json.dumps({**last, SEAL: hashlib.sha256(text.encode()).hexdigest()}) + "\n"
    write_text(path, text)


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
    return sorted(path for path in (UNFINISHED / store).rglob(f"*{SUFFIX}") if path.is_file())


def finished() -> Iterator[Path]:
    """Journals beside results, also those that came with them from elsewhere."""
    for folder, _, names in os.walk("results"):
        paths = (Path(folder) / name for name in sorted(names) if name.endswith(SUFFIX))
        yield from (path for path in paths if path.is_file())
