"""A working folder and an MLflow store of its own for each test. Stages journal; the tests publish, so that they know when it is done."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ebjdat.tracking import journal
from ebjdat.tracking.publish import Outcome, Publisher
from ebjdat.tracking.tracker import About, Subject, Tracker, track

TAGS = {"method": "eb_jdat", "git_commit": "abc", "params_hash": "p", "data_hash": "d", "protocol": "standard: Linf radius 0.15"}
DATA = {"name": "digits", "digest": "d", "source": "digits", "n_train": 3}
CURRENT = "tags.kind = 'result' and tags.superseded = 'false'"
STAGES = "tags.kind = 'result-stage'"
SUBJECT, ABOUT = Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS)


def tracked(
    stage: str = "finetune", tags: dict[str, str] = TAGS, params: dict[str, Any] | None = None, name: str = "eb_jdat", file: str = ""
) -> AbstractContextManager[Tracker]:
    """Track a stage, with results/<stage>.journal.jsonl unless told otherwise."""
    return track(Subject("digits", name, 0, stage), About(params or {}, tags), Path(f"results/{file or stage}.journal.jsonl"))


def run_stage(
    name: str, metrics: dict[str, Any], params: dict[str, Any] | None = None, seed: int = 0, tags: dict[str, str] | None = None
) -> None:
    """A whole stage with a curve and final metrics."""
    params = params or {"training": {"lr": 0.1}}
    about = About(params, {**TAGS, "params_hash": json.dumps(params), **(tags or {})}, DATA)
    with track(Subject("digits", "eb_jdat", seed, name), about, Path(f"results/seed{seed}/{name}.journal.jsonl")) as tracker:
        tracker.metrics({"loss": 1.5, "skipped": "text"}, step=1)
        tracker.metrics({"loss": 0.5}, step=2)
        tracker.final(metrics)


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

    def curve(self, run: Any, name: str = "loss") -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, name)]

    def artifacts(self, run: Any, folder: str | None = None) -> list[str]:
        return [file.path for file in self.client.list_artifacts(run.info.run_id, folder)]

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
