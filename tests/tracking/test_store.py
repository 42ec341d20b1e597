"""SQLite stores that were copied or moved, and stores that cannot be reached."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from ebjdat.tracking import address as addresses
from ebjdat.tracking import journal
from ebjdat.tracking.publish import Publisher
from ebjdat.tracking.tracker import About, Subject, track

from .conftest import TAGS, Mlflow, run_stage


def send_artifact(folder: Path, name: str) -> list[str]:
    """A stage in this folder with a file of this name, sent to the folder's store; what could not be sent."""
    (folder / name).write_text(name)
    with track(Subject("digits", name, 0, "attack"), About({}, TAGS), Path(f"results/{name}/attack.journal.jsonl")) as tracker:
        tracker.artifact(Path(name))
    return Publisher("sqlite:///mlflow.db").publish(journal.finished()).errors


def stored(folder: Path) -> set[str]:
    """Artifacts of all runs in this folder's store, as MLflow finds them."""
    store = Mlflow(folder / "mlflow.db")
    return {path for run in store.runs() for path in store.artifacts(run)}


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (folder / "mlartifacts").rglob("*")}


def test_a_store_that_was_copied_or_moved_goes_on_with_its_own_artifacts(
    empty_store: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy, moved = tmp_path / "first", tmp_path / "copy", tmp_path / "moved"
    first.mkdir()
    (first / "mlflow.db").write_bytes(empty_store)
    monkeypatch.chdir(first)
    assert send_artifact(first, "a.txt") == []
    shutil.copytree(first, copy)
    before = files(first)
    monkeypatch.chdir(copy)
    assert send_artifact(copy, "b.txt") == []
    assert stored(copy) == {"a.txt", "b.txt"}
    assert files(first) == before
    copy.rename(moved)
    monkeypatch.chdir(moved)
    assert send_artifact(moved, "c.txt") == []
    assert stored(moved) == {"a.txt", "b.txt", "c.txt"}
    assert not copy.exists()
    # From a folder below, as DVC runs its experiments, they come to the store, too.
    below = moved / ".dvc/tmp/exps/one"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    (below / "d.txt").write_text("d")
    with track(Subject("digits", "d", 0, "attack"), About({}, TAGS), Path("results/d/attack.journal.jsonl")) as tracker:
        tracker.artifact(Path("d.txt"))
    assert Publisher(f"sqlite:///{moved / 'mlflow.db'}").publish(journal.finished()).errors == []
    monkeypatch.chdir(moved)
    assert stored(moved) == {"a.txt", "b.txt", "c.txt", "d.txt"}


def test_a_store_with_fixed_addresses_is_not_written_to_from_another_place(
    empty_store: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions made them: they go on where they are; moved, they would write to where they were."""
    first, copy, third = tmp_path / "first one", tmp_path / "copy", tmp_path / "third"
    first.mkdir()
    (first / "mlflow.db").write_bytes(empty_store)
    Mlflow(first / "mlflow.db").client.create_experiment("digits", (first / "mlartifacts").as_uri())
    monkeypatch.chdir(first)
    assert send_artifact(first, "a.txt") == []
    shutil.copytree(first, copy)
    before = files(first)
    monkeypatch.chdir(copy)
    (error, *_) = send_artifact(copy, "b.txt")
    assert f"mlflow.db has its artifacts in {first / 'mlartifacts'}, not beside it" in error
    assert "Rename it; `ebjdat sync` fills a new one" in error
    assert files(first) == before
    shutil.copytree(copy, third)
    (third / "mlflow.db").write_bytes(empty_store)  # a new one, where no store is open yet
    monkeypatch.chdir(third)
    assert send_artifact(third, "c.txt") == []
    assert stored(third) == {"a.txt", "b.txt", "c.txt"}


def test_a_database_that_is_not_there_is_said_at_once() -> None:
    run_stage("finetune", {"x": 1})
    for address in ("postgresql://someone:secret@127.0.0.1:9/mlflow", "mysql+nodriver://someone:secret@127.0.0.1:9/mlflow"):
        began = time.monotonic()
        outcome = Publisher(address).publish(journal.finished())
        assert len(outcome.errors) == 1
        assert outcome.errors[0].startswith("TrackingError: ")
        assert "secret" not in outcome.errors[0]
        assert time.monotonic() - began < 10


def test_a_server_that_cannot_be_reached_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9/?api_key=hidden")
    run_stage("finetune", {"x": 1})
    outcome = Publisher(addresses.tracking_uri()).publish(journal.finished())
    assert len(outcome.errors) == 1
    assert not any(secret in outcome.errors[0] for secret in ("secret", "hidden", "someone"))
