"""A working folder and an MLflow store of its own for each test. Stages journal; the tests publish, so that they know when it is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ebjdat.tracking import journal
from ebjdat.tracking.journal import Subject
from ebjdat.tracking.publish import Outcome, Publisher
from ebjdat.tracking.tracker import Tracker

TAGS = {"method": "eb_jdat", "git_commit": "abc", "data_hash": "d", "protocol": "standard: Linf radius 0.15"}
DATA = {"name": "digits", "digest": "d", "source": "digits", "n_train": 3}
RESULTS, STAGES = "tags.kind = 'result'", "tags.kind = 'result-stage'"
CURRENT = f"{RESULTS} and tags.superseded = 'false'"


def tracked(
    stage: str = "finetune",
    params: dict[str, Any] | None = None,
    seed: int = 0,
    name: str = "eb_jdat",
    file: str = "",
    kind: str = "result",
    code: Path | None = None,
    **tags: str,
) -> Tracker:
    """Track a stage. The hash of its settings is their text; file: its journal's name in results/, if it is not the stage's."""
    params = params or {}
    where = Path(f"results/{file or f'{name}/seed{seed}/{stage}'}{journal.SUFFIX}")
    subject = Subject("digits", name, seed, stage, kind)
    return Tracker(subject, params, {**TAGS, "params_hash": json.dumps(params), **tags}, where, DATA, [code] if code else [])


def run_stage(stage: str = "finetune", params: dict[str, Any] | None = None, seed: int = 0, data_hash: str = "d", **final: Any) -> None:
    """A whole stage with a curve and final metrics."""
    with tracked(stage, params, seed, data_hash=data_hash) as tracker:
        tracker.metrics({"loss": 1.5, "skipped": "text"}, step=1)
        tracker.metrics({"loss": 0.5}, step=2)
        tracker.final(final)


@dataclass(frozen=True)
class Mlflow:
    """An SQLite store and what tests ask of it."""

    path: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.path}"

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, text: str = "") -> list[Any]:
        return list(self.client.search_runs([self.client.get_experiment_by_name("digits").experiment_id], text))

    def run(self, text: str = CURRENT) -> Any:
        """The only such run."""
        (run,) = self.runs(text)
        return run

    def curve(self, run: Any, name: str = "loss") -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, name)]

    def artifacts(self, run: Any, folder: str | None = None) -> list[str]:
        return [file.path for file in self.client.list_artifacts(run.info.run_id, folder)]

    def names(self) -> dict[str, str]:
        """Status of every run by name."""
        return {run.info.run_name: run.info.status for run in self.runs()}

    def sync(self) -> Outcome:
        outcome = Publisher(self.uri).publish([*journal.unfinished(), *journal.finished()])
        assert outcome.errors == []
        return outcome


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store's tables, made once: making them takes seconds."""
    store = Mlflow(tmp_path_factory.mktemp("store") / "mlflow.db")
    store.client.search_experiments()
    return store.path.read_bytes()


@pytest.fixture
def store(tmp_path: Path, empty_store: bytes) -> Mlflow:
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return Mlflow(tmp_path / "mlflow.db")
