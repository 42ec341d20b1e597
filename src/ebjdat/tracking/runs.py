"""What a stage says about itself while it runs: settings, curves, final metrics, pictures, its model.

It is written to a journal here and sent to MLflow by another process (`send`), so a server that is slow, down or dying in
the middle costs a stage nothing. EBJDAT_TRACKING=0: nothing is sent; `ebjdat sync` does it later.
"""

from __future__ import annotations

import base64
import contextlib
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebjdat.files import digest
from ebjdat.params import flat
from ebjdat.tracking import background
from ebjdat.tracking.journal import SUFFIX, UNFINISHED, Journal, read
from ebjdat.tracking.system import Sampler


@dataclass(frozen=True)
class Subject:
    """What a run is about. kind: "result" (an experiment's stage), "pretraining" or "report"."""

    run: str  # the profile's run name: MLflow's experiment
    name: str  # experiment or pretraining
    seed: int
    stage: str
    kind: str = "result"

    @property
    def title(self) -> str:
        return f"{self.name}/seed{self.seed}"


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
    """Only what MLflow can take as a metric."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class Tracker:
    """The history of one stage. Every call is harmless: the first failure is reported on stderr, and tracking stops.

    An attempt that was killed goes on in its journal when the stage runs again with the same settings, inputs and code.
    """

    def __init__(self, subject: Subject, about: About) -> None:
        self._journal: Journal | None = None
        self._seen: set[tuple[str, int]] = set()  # points and pictures that an earlier process wrote
        self._samples = 0
        self.seconds = 0.0  # spent here so far
        self._safely(self._open, subject, about)

    def _open(self, subject: Subject, about: About) -> None:
        lasting = {name: value for name, value in about.tags.items() if name != "git_commit"}
        inputs = digest(asdict(subject), about.params, lasting, *about.code)[:16]
        folder = UNFINISHED / subject.run / subject.title
        for path in folder.glob(f"{subject.stage}-{inputs}-*{SUFFIX}"):
            try:
                journal = Journal(path)
            except BlockingIOError:
                return  # another process is at this very work; the stage will notice, too
            events = read(path)
            if events and events[-1].get("end", "KILLED") == "KILLED":
                self._seen = {(event.get("picture", ""), event["step"]) for event in events if {"metrics", "picture"} & event.keys()}
                self._samples = sum("system" in event for event in events)
                self._journal = journal
                journal.write(resumed=True)
                return
            journal.close()
        name = uuid.uuid4().hex
        self._journal = Journal(folder / f"{subject.stage}-{inputs}-{name[:8]}{SUFFIX}")
        begin = {**asdict(subject), "id": name, "dvc_exp": os.environ.get("DVC_EXP_NAME", ""), "host": platform.node()}
        self._journal.write(begin=begin, params={k: str(v) for k, v in flat(about.params).items()}, tags=about.tags, data=about.data)

    def _safely(self, call: Any, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        try:
            call(*arguments, **named)
        except OSError as error:  # a full disk: the science goes on as long as it can
            self._journal = None
            print(f"WARNING: tracking stops for this stage ({type(error).__name__}: {error}); results go on", file=sys.stderr)
        self.seconds += time.perf_counter() - began

    def _write(self, **event: Any) -> None:
        if self._journal is not None:
            self._safely(self._journal.write, **event)

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """A point of the curves. One that an earlier, killed process wrote before is not written again."""
        if ("", step) not in self._seen:
            self._write(metrics=numbers(values), step=step)

    def system(self, values: Mapping[str, float]) -> None:
        """A sample of what the machine does."""
        self._write(system=dict(values), step=self._samples)
        self._samples += 1

    def final(self, values: Mapping[str, Any]) -> None:
        """Final metrics of the stage, for its own run and the experiment's."""
        self._write(final=numbers(values))

    def result(self, name: str, seed: int, tags: Mapping[str, str], values: Mapping[str, Any]) -> None:
        """All final metrics of an experiment and seed, for its run alone. tags: at least params_hash and data_hash."""
        self._write(result={"name": name, "seed": seed, "tags": tags, "metrics": numbers(values)})

    def tag(self, name: str, value: str) -> None:
        self._write(tag=[name, value])

    def artifact(self, path: Path) -> None:
        """A file that the stage wrote. It is sent as long as it still is this one."""
        self._safely(lambda: self._write(artifact=str(path), sha256=digest(path)))

    def picture(self, key: str, png: bytes, step: int) -> None:
        """A picture of a series over training."""
        if (key, step) not in self._seen:
            self._write(picture=key, png=base64.b64encode(png).decode(), step=step)

    def model(self, checkpoint: Path) -> None:
        """The checkpoint to be logged as a model that classifies."""
        self._safely(lambda: self._write(model=str(checkpoint), sha256=digest(checkpoint)))

    def close(self, status: str, copy: Path | None = None) -> None:
        """status: "FINISHED", "FAILED" or "KILLED" (it can go on later). copy: where the finished journal is to lie."""
        self._write(end=status)
        if self._journal is not None:
            self._journal.close(copy)  # the copy is one of the stage's outputs: an error here is the stage's
            if copy is not None and not background.is_on():
                self._journal.path.unlink()
        self._journal = None


@contextlib.contextmanager
def track(subject: Subject, about: About, journal: Path | None = None) -> Iterator[Tracker]:
    """Track one stage. journal: where its finished journal lies, an output of the stage."""
    tracker = Tracker(subject, about)
    background.start()
    status = "FAILED"
    try:
        with Sampler(tracker.system):
            yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status, journal if status == "FINISHED" else None)
        background.warn()
