"""What a stage records while it runs: settings, curves, final metrics, pictures, its model.

A stage writes to its journal alone; another process publishes it (`background`). EBJDAT_TRACKING=0: nothing is published
until `ebjdat sync`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from ebjdat.errors import message
from ebjdat.files import digest
from ebjdat.settings import flat
from ebjdat.tracking import background
from ebjdat.tracking.address import store_id
from ebjdat.tracking.journal import SUFFIX, UNFINISHED, Writer, read, write_finished
from ebjdat.tracking.system import sampling

P = ParamSpec("P")


@dataclass(frozen=True)
class Subject:
    """What a run is about. kind: "result" (an experiment's stage), "pretraining" or "report"."""

    run: str  # the profile's run name: MLflow's experiment
    name: str  # experiment or pretraining
    seed: int
    stage: str
    kind: str = "result"


@dataclass(frozen=True)
class About:
    """What a stage works with. params: all that determines the result (nested); tags: method, hashes, protocol …

    data: name, digest and more of the data set; code: files whose change makes it another attempt.
    """

    params: Mapping[str, Any]
    tags: Mapping[str, str]
    data: Mapping[str, Any] | None = None
    code: Sequence[Path] = ()


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Only what MLflow accepts as a metric."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def harmless(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """A failure of the file system, e.g. a full disk, is reported on stderr; from then on the tracker does nothing."""

    @wraps(method)
    def call(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with self.lock:
            if not self.off:
                try:
                    method(self, *args, **kwargs)
                except OSError as error:
                    self.off = True
                    print(f"WARNING: tracking stops for this stage ({type(error).__name__}: {error}); results go on", file=sys.stderr)

    return call


class Tracker:
    """Records one attempt of a stage. No call raises or waits.

    An attempt that was killed is continued in its journal when the stage runs again with the same settings, inputs and code,
    and repeats the points that were journalled. If a point differs, the stage began anew, and gets a journal of its own.
    """

    def __init__(self, subject: Subject, about: About) -> None:
        self.lock = threading.RLock()  # system metrics come from a thread
        self.off = False
        self._subject, self._about = subject, about
        lasting = {name: value for name, value in about.tags.items() if name != "git_commit"}
        inputs = digest(asdict(subject), about.params, lasting, *about.code)[:16]
        self._folder = UNFINISHED / store_id() / subject.run / f"{subject.name}/seed{subject.seed}"
        self._prefix = f"{subject.stage}-{inputs}-"
        self._journal: Writer | None = None
        self._journalled: dict[tuple[str, int], str] = {}  # points and pictures of an earlier process: (picture, step) -> text
        self._samples = 0
        self._open()

    @harmless
    def _open(self) -> None:
        for path in self._folder.glob(f"{self._prefix}*{SUFFIX}"):
            try:
                journal = Writer(path)
            except BlockingIOError:  # another process does this very work; the stage notices that by itself
                self.off = True
                return
            try:
                events = read(path)
            except ValueError:  # damaged; the publisher reports it
                events = []
            if events and events[-1].end in (None, "KILLED") and not events[-1].given_up:
                self._journalled = {(e.picture, e.step): _text(e.metrics or {}) for e in events if e.picture or e.metrics is not None}
                self._samples = sum(event.system is not None for event in events)
                self._journal = journal
                journal.write(resumed=True)
                return
            journal.close()
        self._begin()

    def _begin(self) -> None:
        name = uuid.uuid4().hex
        self._journal, self._journalled, self._samples = Writer(self._folder / f"{self._prefix}{name[:8]}{SUFFIX}"), {}, 0
        host = os.environ.get("EBJDAT_HOST") or platform.node()
        begin = {**asdict(self._subject), "id": name, "dvc_exp": os.environ.get("DVC_EXP_NAME", ""), "host": host}
        params = {k: str(v) for k, v in flat(self._about.params).items()}
        self._write(begin=begin, params=params, tags=self._about.tags, data=self._about.data)

    @harmless
    def _write(self, /, **event: Any) -> None:
        if self._journal is not None:
            self._journal.write(**event)

    @harmless
    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """A point of the curves. One that an earlier, killed process wrote is not written again."""
        point = numbers(values)
        if self._journal and self._journalled.get(("", step), _text(point)) != _text(point):
            self._write(end="KILLED", given_up=True)
            self._journal.close()
            self._begin()
        if ("", step) not in self._journalled:
            self._write(metrics=point, step=step)

    @harmless
    def system(self, values: Mapping[str, float]) -> None:
        """A sample of the machine's load."""
        self._write(system=dict(values), step=self._samples)
        self._samples += 1

    def final(self, values: Mapping[str, Any]) -> None:
        """Final metrics of the stage, for its own run and the experiment's."""
        self._write(final=numbers(values))

    @harmless
    def result(
        self, name: str, seed: int, tags: Mapping[str, str], values: Mapping[str, Any], artifacts: Sequence[Path], checkpoint: Path
    ) -> None:
        """All that an experiment and seed has, for its run alone. tags: at least params_hash and data_hash; files may be missing."""
        files = [_file("artifact", path) for path in artifacts if path.exists()]
        model = _file("model", checkpoint) if checkpoint.exists() else None
        row = {"name": name, "seed": seed, "tags": tags, "metrics": numbers(values), "artifacts": files, "model": model}
        self._write(result=row)

    def tag(self, name: str, value: str) -> None:
        self._write(tag=[name, value])

    @harmless
    def artifact(self, path: Path) -> None:
        """A file that the stage wrote. It is published while it still has this content."""
        self._write(**_file("artifact", path))

    @harmless
    def picture(self, key: str, png: bytes, step: int) -> None:
        """A picture of a series over training."""
        if (key, step) not in self._journalled:
            self._write(picture=key, png=base64.b64encode(png).decode(), step=step)

    @harmless
    def model(self, checkpoint: Path) -> None:
        """The checkpoint to be logged as a model that classifies."""
        self._write(**_file("model", checkpoint))

    def close(self, status: str, copy: Path | None = None) -> None:
        """status: "FINISHED", "FAILED" or "KILLED" (can be continued). copy: where the finished journal will lie.

        Raises OSError when the copy cannot be written: it is one of the stage's outputs.
        """
        self._write(end=status)
        path = self._journal.path if self._journal else None
        if copy is not None:
            try:
                write_finished(path, status, copy)
            except ValueError as error:
                print(message(f"WARNING: {path}: damaged while it was written ({error}); results go on"), file=sys.stderr)
                write_finished(None, status, copy)
        if self._journal is not None:
            self._journal.close()
            if copy is not None and not background.is_on():
                self._journal.path.unlink(missing_ok=True)


def _text(point: Mapping[str, float]) -> str:
    """To compare points: NaN does not equal itself, but its text does."""
    return json.dumps(point, sort_keys=True)


def _file(key: str, path: Path) -> dict[str, str]:
    return {key: str(path), "sha256": digest(path)}


@contextlib.contextmanager
def track(subject: Subject, about: About, journal: Path | None = None) -> Iterator[Tracker]:
    """Track one stage. journal: where its finished journal will lie, an output of the stage."""
    tracker = Tracker(subject, about)
    background.start()
    status = "FAILED"
    try:
        with sampling(tracker.system):
            yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status, journal if status == "FINISHED" else None)
        if "/.dvc/tmp/exps/" in f"{Path.cwd()}/":  # DVC deletes this copy of the project when its experiment ends
            background.wait()
        background.warn()
