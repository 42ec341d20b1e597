"""What a stage says about itself while it runs: settings, curves, final metrics, pictures, its model.

It is written to a journal here and sent to MLflow by another process (`send`), so a server that is slow, down or dying in
the middle costs a stage nothing. EBJDAT_TRACKING=0: nothing is sent; `ebjdat sync` does it later.
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
from pathlib import Path
from typing import Any

from ebjdat.errors import message
from ebjdat.files import digest
from ebjdat.settings import flat
from ebjdat.tracking import background
from ebjdat.tracking.journal import SUFFIX, UNFINISHED, Journal, read, write_finished
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


def _text(point: Mapping[str, float]) -> str:
    """To compare points by: NaN is no number that equals itself, but the same text."""
    return json.dumps(point, sort_keys=True)


class Tracker:
    """The history of one stage. Every call is harmless: the first failure is reported on stderr, and tracking stops.

    An attempt that was killed goes on in its journal when the stage runs again with the same settings, inputs and code, and
    says the same about what had been journalled; else it was begun anew, and so is the journal.
    """

    def __init__(self, subject: Subject, about: About) -> None:
        self._subject, self._about = subject, about
        self._journal: Journal | None = None
        self._off = False
        self._lock = threading.RLock()  # samples of the machine come from a thread
        self._seen: dict[tuple[str, int], str] = {}  # points and pictures that an earlier process wrote
        self._samples = 0
        self._safely(self._open)

    def _open(self) -> None:
        subject, about = self._subject, self._about
        lasting = {name: value for name, value in about.tags.items() if name != "git_commit"}
        inputs = digest(asdict(subject), about.params, lasting, *about.code)[:16]
        folder = UNFINISHED / background.store() / subject.run / subject.title
        for path in folder.glob(f"{subject.stage}-{inputs}-*{SUFFIX}"):
            try:
                journal = Journal(path)
            except BlockingIOError:
                self._off = True  # another process is at this very work; the stage will notice, too
                return
            try:
                events = read(path)
            except ValueError:  # damaged: who sends says so; this attempt has a journal of its own
                journal.close()
                continue
            if events and events[-1].get("end", "KILLED") == "KILLED" and "given_up" not in events[-1]:
                seen = [event for event in events if {"metrics", "picture"} & event.keys()]
                self._seen = {(event.get("picture", ""), event["step"]): _text(event.get("metrics", {})) for event in seen}
                self._samples = sum("system" in event for event in events)
                self._journal = journal
                journal.write(resumed=True)
                return
            journal.close()
        self._begin(folder / f"{subject.stage}-{inputs}")

    def _begin(self, start: Path) -> None:
        name = uuid.uuid4().hex
        self._journal = Journal(start.with_name(f"{start.name}-{name[:8]}{SUFFIX}"))
        host = os.environ.get("EBJDAT_HOST") or platform.node()
        begin = {**asdict(self._subject), "id": name, "dvc_exp": os.environ.get("DVC_EXP_NAME", ""), "host": host}
        params = {k: str(v) for k, v in flat(self._about.params).items()}
        self._journal.write(begin=begin, params=params, tags=self._about.tags, data=self._about.data)

    def _begin_anew(self) -> None:
        """What was journalled is of an attempt that is not continued."""
        if self._journal is not None:
            self._journal.write(end="KILLED", given_up=True)
            self._journal.close()
            self._seen, self._samples = {}, 0
            self._begin(self._journal.path.with_name(self._journal.path.name.rpartition("-")[0]))

    def _safely(self, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
        try:
            with self._lock:
                if not self._off:
                    call(*arguments, **named)
        except OSError as error:  # a full disk: the science goes on as long as it can
            self._off = True
            print(f"WARNING: tracking stops for this stage ({type(error).__name__}: {error}); results go on", file=sys.stderr)

    def _write(self, **event: Any) -> None:
        journal = self._journal
        if journal is not None:
            self._safely(journal.write, **event)

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """A point of the curves. One that an earlier, killed process wrote before is not written again."""
        point = numbers(values)
        if self._seen.get(("", step), _text(point)) != _text(point):
            self._safely(self._begin_anew)
        if ("", step) not in self._seen:
            self._write(metrics=point, step=step)

    def system(self, values: Mapping[str, float]) -> None:
        """A sample of what the machine does."""
        self._write(system=dict(values), step=self._samples)
        self._samples += 1

    def final(self, values: Mapping[str, Any]) -> None:
        """Final metrics of the stage, for its own run and the experiment's."""
        self._write(final=numbers(values))

    def result(
        self, name: str, seed: int, tags: Mapping[str, str], values: Mapping[str, Any], artifacts: Sequence[Path], checkpoint: Path
    ) -> None:
        """All that an experiment and seed has, for its run alone. tags: at least params_hash and data_hash; files may be missing."""

        def call() -> None:
            files = [{"artifact": str(path), "sha256": digest(path)} for path in artifacts if path.exists()]
            model = {"model": str(checkpoint), "sha256": digest(checkpoint)} if checkpoint.exists() else None
            row = {"name": name, "seed": seed, "tags": tags, "metrics": numbers(values), "artifacts": files, "model": model}
            self._write(result=row)

        self._safely(call)

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
        """status: "FINISHED", "FAILED" or "KILLED" (it can go on later). copy: where the finished journal is to lie.

        Raises OSError when the copy cannot be written: it is one of the stage's outputs.
        """
        self._write(end=status)
        journal = self._journal
        if copy is not None:
            try:
                events = read(journal.path) if journal is not None else []
            except ValueError as error:
                events = []
                print(
                    message(f"WARNING: {journal and journal.path}: damaged while it was written ({error}); results go on"), file=sys.stderr
                )
            if events and events[-1].get("end") != status:  # not all could be journalled
                events.append({"time": events[-1]["time"], "end": status})
            write_finished(events, copy)
        if journal is not None:
            journal.close()
            if copy is not None and not background.is_on():
                journal.path.unlink(missing_ok=True)


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
        if "/.dvc/tmp/exps/" in f"{Path.cwd()}/":  # DVC deletes this copy of the project when its experiment ends
            background.wait()
        background.warn()
