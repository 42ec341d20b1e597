"""The journal of a stage: a local file of JSON lines. Its first line says what it is about, its last line how the stage ended.

A stage writes only here, which takes microseconds and needs no server; `publish` brings journals into MLflow. A finished journal
lies beside the stage's results and is versioned with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

UNFINISHED = Path("state/tracking")
SUFFIX = ".journal.jsonl"
LOCK_ATTEMPTS = 20  # a tenth of a second apart: a reader holds the lock for a moment, to see whether the writer is alive
MAX_BYTES = 64 * 2**20  # typical journals have up to a few MB
MAX_LINES = 500_000


@dataclass(frozen=True)
class Subject:
    """What a journal is about. kind: "result" (an experiment's stage), "pretraining" or "report". The rest is of one attempt."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    run: str  # the profile's run name: MLflow's experiment
    name: str  # experiment or pretraining
    seed: int
    stage: str
    kind: str = "result"
    id: str = ""
    dvc_exp: str = ""
    host: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}/seed{self.seed}" + (f" [{self.dvc_exp}]" if self.dvc_exp else "")


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

    step: epoch of a point of the curves or a picture; `read` numbers the samples of the machine's load ("system").
    sha256: of the file that the line names; in the last line of a finished journal, of all lines before it.
    """

    time: int
    begin: Subject | None = None
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    data: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None
    system: dict[str, float] = {}
    final: dict[str, float] = {}
    step: int = 0
    tag: tuple[str, str] | None = None
    artifact: str = ""
    picture: str = ""
    png: str = ""
    model: str = ""
    sha256: str = ""
    result: Result | None = None
    end: Literal["FINISHED", "FAILED", "KILLED"] | None = None

    @property
    def subject(self) -> Subject:
        """Of a first line."""
        assert self.begin is not None  # checked by `read`
        return self.begin


class Writer:
    """Appends events to a journal, and locks the file, so that readers see that its writer is alive.

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
                    raise BlockingIOError(f"{path}: another process writes it") from None
                time.sleep(0.1)
        self._file.truncate(len(self._whole_lines()))

    def write(self, **event: Any) -> None:
        """Raises OSError when only a part of the line could be written; readers ignore that part, the next writer cuts it off."""
        line = (json.dumps({"time": int(time.time() * 1000), **event}) + "\n").encode()
        if (written := self._file.write(line)) != len(line):
            raise OSError(f"{self.path}: {written} of {len(line)} bytes could be written")

    def sealed(self) -> bytes:
        """The content of a finished journal: the lines so far, and that the stage finished, with the sha256 of those lines."""
        lines = self._whole_lines()
        end = {"time": int(time.time() * 1000), "end": "FINISHED", "sha256": hashlib.sha256(lines).hexdigest()}
        return lines + json.dumps(end).encode() + b"\n"

    def _whole_lines(self) -> bytes:
        self._file.seek(0)
        content = self._file.read()
        return content[: content.rfind(b"\n") + 1]

    def close(self) -> None:
        self._file.close()


def read(path: Path, limit: int | None = None) -> list[Event]:
    """The events of a journal, or its first ones; without a last line that is incomplete.

    Raises ValueError that names the first invalid line, or says that a finished journal was changed.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size:,} bytes; {MAX_BYTES:,} are allowed")
    events: list[Event] = []
    before, samples = hashlib.sha256(), 0
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
            if number == 1 and not (event.begin and event.begin.id and {"params", "tags", "data"} <= event.model_fields_set):
                raise ValueError("line 1: does not say what it is about")
            if number > 1 and event.begin:
                raise ValueError(f"line {number}: begins again")
            if event.end and event.sha256 not in ("", before.hexdigest()):
                raise ValueError(f"line {number}: its sha256 does not match the lines before it")
            if event.system:
                event.step, samples = samples, samples + 1
            before.update(line)
            events.append(event)
    if size and is_finished(path) and not (events and (limit or events[-1].end)):
        raise ValueError("its last line does not say how its stage ended")
    return events


def is_finished(path: Path) -> bool:
    """Whether a journal lies beside results."""
    return not path.is_relative_to(UNFINISHED)


def is_written(path: Path) -> bool:
    """Whether the process that writes this journal is alive."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # published and deleted in the meantime
        pass
    return False


def unfinished(store: str = "") -> list[Path]:
    """Journals of stages that run, were killed, or are not published yet. store: only those meant for this one."""
    return sorted(path for path in (UNFINISHED / store).rglob(f"*{SUFFIX}") if path.is_file())


def finished() -> Iterator[Path]:
    """Journals beside results, also those that came with them from elsewhere."""
    for folder, _, names in os.walk("results"):
        yield from (path for name in sorted(names) if name.endswith(SUFFIX) and (path := Path(folder) / name).is_file())
