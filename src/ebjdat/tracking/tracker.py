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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from ebjdat.files import digest, write_atomic
from ebjdat.settings import flat
from ebjdat.tracking import background
from ebjdat.tracking.address import store_id
from ebjdat.tracking.journal import SUFFIX, UNFINISHED, Subject, Writer, read
from ebjdat.tracking.system import sampling


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Only what MLflow accepts as a metric."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class Tracker:
    """Records one attempt of a stage: `with Tracker(…) as tracker`. No call raises or waits.

    An attempt that was killed is continued in its journal when the stage runs again with the same settings, inputs and code. The
    stage repeats what it said before, which is not written again. If a point of the curves differs, the stage began anew, and gets a
    journal of its own.
    """

    def __init__(
        self,
        subject: Subject,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        journal: Path | None = None,
        data: Mapping[str, Any] | None = None,
        code: Sequence[Path] = (),
    ) -> None:
        """params: all that determines the result (nested). tags: method, hashes, protocol … data: name, digest and more of the data set.

        journal: where the finished journal will lie, an output of the stage. code: files whose change makes it another attempt.
        """
        self._finished = journal
        self._sampling = contextlib.ExitStack()
        self._lock = threading.RLock()  # system metrics come from a thread
        self._off = False
        self._journal: Writer | None = None
        self._lines: set[str] = set()  # what an earlier, killed process wrote, without its time
        self._steps: set[int] = set()  # the points of the curves among it
        lasting = {name: value for name, value in tags.items() if name != "git_commit"}
        inputs = digest(asdict(subject), params, lasting, *code)[:16]
        self._folder = UNFINISHED / store_id() / subject.run / f"{subject.name}/seed{subject.seed}"
        self._prefix = f"{subject.stage}-{inputs}-"
        host = os.environ.get("EBJDAT_HOST") or platform.node()
        self._subject = replace(subject, dvc_exp=os.environ.get("DVC_EXP_NAME", ""), host=host)
        self._about: dict[str, Any] = {"params": {k: str(v) for k, v in flat(params).items()}, "tags": tags, "data": data}
        with self._harmless():
            self._open()

    def __enter__(self) -> Self:
        background.start()
        self._sampling.enter_context(sampling(self.system))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._sampling.close()
        self.close("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        if "/.dvc/tmp/exps/" in f"{Path.cwd()}/":  # DVC deletes this copy of the project when its experiment ends
            background.wait()
        background.warn()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """A failure of the file system, e.g. a full disk, is reported on stderr; from then on the tracker does nothing."""
        with self._lock:
            try:
                yield
            except OSError as error:
                if not self._off:
                    print(f"WARNING: tracking stops for this stage ({type(error).__name__}: {error}); results go on", file=sys.stderr)
                self._off = True

    def _open(self) -> None:
        for path in self._folder.glob(f"{self._prefix}*{SUFFIX}"):
            journal = Writer(path)
            try:
                events = read(path)
            except ValueError:  # damaged; the publisher reports it
                events = []
            if events and events[-1].end in (None, "KILLED"):
                said = [event.model_dump(exclude={"time"}, exclude_unset=True) for event in events if not event.end]
                self._lines, self._steps = set(map(_text, said)), {event.step for event in events if event.metrics is not None}
                self._journal = journal
                return
            journal.close()
        self._begin()

    def _begin(self) -> None:
        name = uuid.uuid4().hex
        self._lines, self._steps = set(), set()
        self._journal = Writer(self._folder / f"{self._prefix}{name[:8]}{SUFFIX}")
        self._journal.write(begin=asdict(replace(self._subject, id=name)), **self._about)

    def _write(self, /, **event: Any) -> None:
        with self._harmless():
            if self._journal and not self._off and _text(event) not in self._lines:
                self._journal.write(**event)

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """A point of the curves."""
        point = {"metrics": numbers(values), "step": step}
        with self._harmless():
            if self._journal and not self._off and step in self._steps and _text(point) not in self._lines:
                self._journal.write(end="FAILED")  # the killed attempt, which nobody continues
                self._journal.close()
                self._begin()
        self._write(**point)

    def system(self, values: Mapping[str, float]) -> None:
        """A sample of the machine's load."""
        self._write(system=dict(values))

    def final(self, values: Mapping[str, Any]) -> None:
        """Final metrics of the stage, for its own run and the experiment's."""
        self._write(final=numbers(values))

    def result(
        self, name: str, seed: int, tags: Mapping[str, str], values: Mapping[str, Any], artifacts: Sequence[Path], checkpoint: Path
    ) -> None:
        """All that an experiment and seed has, for its run alone. tags: at least params_hash and data_hash; files may be missing."""
        with self._harmless():
            files = [_file("artifact", path) for path in artifacts if path.exists()]
            model = _file("model", checkpoint) if checkpoint.exists() else None
            row = {"name": name, "seed": seed, "tags": tags, "metrics": numbers(values), "artifacts": files, "model": model}
            self._write(result=row)

    def tag(self, name: str, value: str) -> None:
        self._write(tag=[name, value])

    def artifact(self, path: Path) -> None:
        """A file that the stage wrote. It is published while it still has this content."""
        with self._harmless():
            self._write(**_file("artifact", path))

    def picture(self, key: str, png: bytes, step: int) -> None:
        """A picture of a series over training."""
        self._write(picture=key, png=base64.b64encode(png).decode(), step=step)

    def model(self, checkpoint: Path) -> None:
        """The checkpoint to be logged as a model that classifies."""
        with self._harmless():
            self._write(**_file("model", checkpoint))

    def close(self, status: str) -> None:
        """status: "FINISHED", "FAILED" or "KILLED" (can be continued).

        Raises OSError when the finished journal cannot be written: it is one of the stage's outputs. It is empty where nothing could
        be journalled.
        """
        finished = self._finished if status == "FINISHED" else None
        content = self._journal.sealed() if self._journal and finished else b""
        self._write(end=status)
        if finished:
            write_atomic(finished, lambda temporary: temporary.write_bytes(content))
        if self._journal:
            self._journal.close()
            if finished and not background.is_on():
                self._journal.path.unlink(missing_ok=True)


def _text(event: Mapping[str, Any]) -> str:
    """To compare events: NaN does not equal itself, but its text does."""
    return json.dumps(event, sort_keys=True)


def _file(key: str, path: Path) -> dict[str, str]:
    return {key: str(path), "sha256": digest(path)}
