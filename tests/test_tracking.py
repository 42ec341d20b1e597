"""MLflow, the real one, on a fresh SQLite store: layout, reruns, four processes at once, and that it never stops a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ebjdat.params import flat
from ebjdat.tracking.runs import Subject, numbers, track

PROVENANCE = {"git_commit": "abc", "params_hash": "p", "data_hash": "d"}


@pytest.fixture(autouse=True)
def fresh_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("EBJDAT_TRACKING", raising=False)


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., list[Any]]:
    def search(filter_string: str, experiment: str = "digits") -> list[Any]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id], filter_string))

    return search


RESULT = "tags.kind = 'result' and tags.superseded = 'false'"


def stage(name: str, metrics: dict[str, Any], params: dict[str, Any] | None = None, seed: int = 0) -> None:
    with track(Subject("digits", "eb_jdat", seed, name), params or {"training": {"lr": 0.1}}, PROVENANCE) as tracker:
        tracker.metrics({"loss": 1.5, "skipped": "text"}, step=1)
        tracker.metrics({"loss": 0.5}, step=2)
        tracker.final(metrics)


def test_one_run_per_experiment_and_seed_carries_all_final_metrics(runs: Callable[..., list[Any]], tmp_path: Path) -> None:
    stage("finetune", {"train_seconds": 3.0})
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"png")
    with track(Subject("digits", "eb_jdat", 0, "attack"), {"training": {"lr": 0.1}}, PROVENANCE) as tracker:
        tracker.final({"clean_acc": 0.9, "n_test": 100, "norm": "Linf", "ok": True})
        tracker.artifact(picture)
    stage("finetune", {"train_seconds": 4.0}, seed=1)
    found = {r.info.run_name: r for r in runs(RESULT)}
    assert set(found) == {"eb_jdat/seed0", "eb_jdat/seed1"}
    run = found["eb_jdat/seed0"]
    assert run.data.metrics == {"train_seconds": 3.0, "clean_acc": 0.9, "n_test": 100.0}
    assert run.data.params == {"training.lr": "0.1"}
    assert run.info.status == "FINISHED"
    assert {k: run.data.tags[k] for k in (*PROVENANCE, "experiment", "seed")} == {**PROVENANCE, "experiment": "eb_jdat", "seed": "0"}
    children = runs(f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert {c.info.run_name for c in children} == {"eb_jdat/seed0/finetune", "eb_jdat/seed0/attack"}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    finetune = next(c for c in children if c.info.run_name.endswith("finetune"))
    assert [(m.step, m.value) for m in client.get_metric_history(finetune.info.run_id, "loss")] == [(1, 1.5), (2, 0.5)]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["grid.png"]


def test_a_rerun_updates_and_new_settings_supersede(runs: Callable[..., list[Any]]) -> None:
    stage("finetune", {"train_seconds": 3.0})
    stage("attack", {"clean_acc": 0.8})
    stage("finetune", {"train_seconds": 5.0})
    (run,) = runs(RESULT)
    assert run.data.metrics == {"train_seconds": 5.0, "clean_acc": 0.8}
    assert len(runs("tags.kind = 'result-stage' and tags.superseded = 'false'")) == 2
    stage("finetune", {"train_seconds": 6.0}, {"training": {"lr": 0.2}})
    (new,) = runs(RESULT)
    assert new.info.run_id != run.info.run_id
    assert new.data.params == {"training.lr": "0.2"}
    assert new.data.metrics == {"train_seconds": 6.0}
    assert {c.info.run_name for c in runs(f"tags.`mlflow.parentRunId` = '{new.info.run_id}'")} == {
        "eb_jdat/seed0/finetune",
        "eb_jdat/seed0/attack",
    }
    with track(Subject("digits", "eb_jdat", 0, None), {"training": {"lr": 0.2}}, PROVENANCE) as tracker:
        tracker.final({"clean_acc": 0.7})
    (final,) = runs(RESULT)
    assert final.data.metrics == {"train_seconds": 6.0, "clean_acc": 0.7}


def test_failures_are_marked(runs: Callable[..., list[Any]]) -> None:
    def fail() -> None:
        with track(Subject("digits", "eb_jdat", 0, "finetune"), {}, PROVENANCE):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {r.info.status for r in runs("")} == {"FAILED"}


def test_four_processes_on_a_store_that_does_not_exist_lose_nothing(runs: Callable[..., list[Any]], tmp_path: Path) -> None:
    code = (
        "import sys; from ebjdat.tracking.runs import Subject, track\n"
        "with track(Subject('digits', 'e' + sys.argv[1], 0, 'finetune'), {'a': 1}, {}) as t:\n"
        "    for step in range(20): t.metrics({'loss': step}, step)\n"
        "    t.final({'done': 1})"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(i)], stderr=subprocess.PIPE, text=True) for i in range(4)]
    errors = [p.communicate()[1] for p in started]
    assert not any("WARNING" in e for e in errors), errors
    assert sorted(r.data.tags["experiment"] for r in runs(RESULT)) == ["e0", "e1", "e2", "e3"]
    children = runs("tags.kind = 'result-stage'")
    assert [c.data.metrics for c in children] == [{"loss": 19.0, "done": 1.0}] * 4


def test_a_store_that_cannot_be_used_warns_once_and_the_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = []
    with track(Subject("digits", "e", 0, "finetune"), {}, {}) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        tracker.final({"x": 1})
        done.append(True)
    assert done == [True]
    assert capsys.readouterr().err.count("WARNING: tracking stops") == 1


def test_tracking_uri_is_honoured_and_can_be_switched_off(
    runs: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    stage("finetune", {"x": 1})
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.delenv("EBJDAT_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    stage("finetune", {"x": 1})
    assert (tmp_path / "other.db").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_flat_and_numbers() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": [1]}) == {"a.b": 1, "a.c.d": 2, "e": [1]}
    assert numbers({"a": 1, "b": True, "c": "x", "d": 0.5, "e": None}) == {"a": 1.0, "d": 0.5}
