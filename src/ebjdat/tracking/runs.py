"""One MLflow run per experiment and seed with all its final metrics; its stages are child runs with the curves.

A result is written to files first; tracking can be off (EBJDAT_TRACKING=0), fail or be deleted without any loss there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebjdat.files import lock
from ebjdat.params import flat

DEFAULT_STORE = Path("mlflow.db")
DEFAULT_ARTIFACTS = Path("mlartifacts")
LOCK = Path("state/mlflow.lock")


@dataclass(frozen=True)
class Subject:
    """What a run is about. kind: "result" (an experiment's stage), "pretraining" or "report".

    stage None: the run of the experiment and seed itself, not one of its stages.
    """

    run: str  # the profile's run name: MLflow's experiment
    name: str  # experiment or pretraining
    seed: int
    stage: str | None
    kind: str = "result"

    @property
    def title(self) -> str:
        return f"{self.name}/seed{self.seed}"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE.resolve()}"


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Only what MLflow can take as a metric."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class Tracker:
    """Logs of one stage. Every call is harmless: the first failure is reported on stderr, and tracking stops."""

    def __init__(self, open_run: Callable[[], tuple[Any, str, str | None]] | None) -> None:
        self._client: Any = None
        self._run = ""
        self._parent: str | None = None
        self._off = open_run is None
        if open_run is not None:
            self._safely(lambda: self._open(open_run))

    def _open(self, open_run: Callable[[], tuple[Any, str, str | None]]) -> None:
        self._client, self._run, self._parent = open_run()

    def _safely(self, call: Callable[[], object]) -> None:
        if self._off:
            return
        try:
            call()
        except Exception as error:  # whatever a store, a server or a full disk throws: the science goes on
            self._off = True
            print(f"WARNING: tracking stops for this stage ({type(error).__name__}: {error}); results go on", file=sys.stderr)

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """A point of the curves, on the stage's run."""

        def call() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            batch = [Metric(name, value, now, step) for name, value in numbers(values).items()]
            self._client.log_batch(self._run, metrics=batch)

        self._safely(call)

    def final(self, values: Mapping[str, Any]) -> None:
        """Final metrics of the stage, on its own run and on the experiment's."""

        def call() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            batch = [Metric(name, value, now, 0) for name, value in numbers(values).items()]
            for run in filter(None, (self._run, self._parent)):
                self._client.log_batch(run, metrics=batch)

        self._safely(call)

    def tag(self, name: str, value: str) -> None:
        """A tag, on the stage's run and on the experiment's."""

        def call() -> None:
            for run in filter(None, (self._run, self._parent)):
                self._client.set_tag(run, name, value)

        self._safely(call)

    def artifact(self, path: Path) -> None:
        """A file, on the stage's run and on the experiment's."""

        def call() -> None:
            for run in filter(None, (self._run, self._parent)):
                self._client.log_artifact(run, str(path))

        self._safely(call)

    def close(self, status: str) -> None:
        def call() -> None:
            for run in filter(None, (self._run, self._parent)):
                self._client.set_terminated(run, status)

        self._safely(call)


@contextlib.contextmanager
def track(subject: Subject, params: Mapping[str, Any], provenance: Mapping[str, str]) -> Iterator[Tracker]:
    """Track one stage. params: everything that determines the result (nested); provenance: git commit, hashes."""
    on = os.environ.get("EBJDAT_TRACKING", "1") != "0"
    tracker = Tracker((lambda: _open_run(subject, params, provenance)) if on else None)
    try:
        yield tracker
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED")


def _open_run(subject: Subject, params: Mapping[str, Any], provenance: Mapping[str, str]) -> tuple[Any, str, str | None]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    with lock(LOCK):  # a store's first use is a race between processes
        client = MlflowClient(tracking_uri())
        experiment = _experiment(client, subject.run)
        tags = {
            **provenance,
            "kind": subject.kind,
            "experiment": subject.name,
            "seed": str(subject.seed),
            "mlflow.source.name": "ebjdat",
            "mlflow.source.git.commit": provenance.get("git_commit", ""),
        }
        flat_params = {name: str(value) for name, value in flat(params).items()}
        if subject.stage is not None:
            for old in _search(client, experiment, subject, f"{subject.kind}-stage", f" and tags.stage = '{subject.stage}'"):
                _supersede(client, old)
        parent = _parent(client, experiment, subject, flat_params, tags) if subject.kind == "result" else None
        if subject.stage is None and parent:
            return client, parent, None
        child_tags = {**tags, "kind": f"{subject.kind}-stage", "stage": subject.stage or "", "superseded": "false"}
        if parent:
            child_tags["mlflow.parentRunId"] = parent
        run = client.create_run(experiment, run_name=f"{subject.title}/{subject.stage}", tags=child_tags)
        _log_params(client, run.info.run_id, flat_params)
        return client, run.info.run_id, parent


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = "MLFLOW_TRACKING_URI" not in os.environ
    location = DEFAULT_ARTIFACTS.resolve().as_uri() if local else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on the runs with their metrics
    return str(client.create_experiment(name, location, tags=kind))


def _supersede(client: Any, run: Any) -> None:
    """Mark a run that a newer one replaces; its history stays."""
    client.set_tag(run.info.run_id, "superseded", "true")
    client.set_tag(run.info.run_id, "mlflow.runName", f"{run.info.run_name} (superseded)")
    if run.info.status == "RUNNING":  # its process was killed
        client.set_terminated(run.info.run_id, "KILLED")


def _search(client: Any, experiment: str, subject: Subject, kind: str, more: str = "") -> list[Any]:
    """Runs of this subject that are not superseded."""
    return list(
        client.search_runs(
            [experiment],
            f"tags.kind = '{kind}' and tags.experiment = '{subject.name}' and tags.seed = '{subject.seed}'"
            f" and tags.superseded = 'false'{more}",
        )
    )


def _parent(client: Any, experiment: str, subject: Subject, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """The run of this experiment and seed; a new one when the settings differ from what the old one says (params are immutable).

    Also a new one when the old training diverged and is done again: what was logged of that cannot be taken back.
    """
    found = _search(client, experiment, subject, subject.kind)
    stale = subject.stage == "finetune" and bool(found) and any(tag.startswith("event_") for tag in found[0].data.tags)
    if found and found[0].data.params == params and not stale:
        for name, value in tags.items():
            client.set_tag(found[0].info.run_id, name, value)
        return str(found[0].info.run_id)
    run = client.create_run(experiment, run_name=subject.title, tags={**tags, "superseded": "false"})
    new = str(run.info.run_id)
    _log_params(client, new, params)
    for old in found:
        _supersede(client, old)
        for child in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{old.info.run_id}' and tags.superseded = 'false'"):
            client.set_tag(child.info.run_id, "mlflow.parentRunId", new)
    return new


def _log_params(client: Any, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    items = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(items), 100):  # MLflow's limit per call
        client.log_batch(run, params=items[start : start + 100])
