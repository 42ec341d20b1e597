"""SQLite stores that were copied or moved, and stores that cannot be reached."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from ebjdat.tracking import journal
from ebjdat.tracking.publish import Publisher

from .conftest import Mlflow, run_stage, tracked


def send_artifact(name: str, store: str = "mlflow.db") -> list[str]:
    """A stage in the working folder with a file of this name, published; what could not be."""
    Path(name).write_text(name)
    with tracked("attack", name=name) as tracker:
        tracker.artifact(Path(name))
    return Publisher(f"sqlite:///{store}").publish(journal.finished()).errors


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
    assert send_artifact("a.txt") == []
    shutil.copytree(first, copy)
    before = files(first)
    monkeypatch.chdir(copy)
    assert send_artifact("b.txt") == []
    assert stored(copy) == {"a.txt", "b.txt"}
    assert files(first) == before
    copy.rename(moved)
    monkeypatch.chdir(moved)
    assert send_artifact("c.txt") == []
    assert stored(moved) == {"a.txt", "b.txt", "c.txt"}
    assert not copy.exists()
    # From a folder below, as DVC runs its experiments, they come to the store, too.
    below = moved / ".dvc/tmp/exps/one"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert send_artifact("d.txt", str(moved / "mlflow.db")) == []
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
    assert send_artifact("a.txt") == []
    shutil.copytree(first, copy)
    before = files(first)
    monkeypatch.chdir(copy)
    (error, *_) = send_artifact("b.txt")
    assert f"mlflow.db has its artifacts in {first / 'mlartifacts'}, not beside it" in error
    assert "Rename it; `ebjdat sync` fills a new one" in error
    assert files(first) == before
    shutil.copytree(copy, third)
    (third / "mlflow.db").write_bytes(empty_store)  # a new one, where no store is open yet
    monkeypatch.chdir(third)
    assert send_artifact("c.txt") == []
    assert stored(third) == {"a.txt", "b.txt", "c.txt"}


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("postgresql://someone:secret@127.0.0.1:9/mlflow", "TrackingError: "),
        ("mysql+nodriver://someone:secret@127.0.0.1:9/mlflow", "TrackingError: "),
        ("http://someone:secret@127.0.0.1:9/?api_key=hidden", "MlflowException: "),
    ],
)
def test_a_store_that_cannot_be_reached_is_reported_at_once_without_its_password(
    monkeypatch: pytest.MonkeyPatch, address: str, error: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    run_stage()
    began = time.monotonic()
    (found,) = Publisher(address).publish(journal.finished()).errors
    assert time.monotonic() - began < 10
    assert found.startswith(error)
    assert not any(secret in found for secret in ("secret", "hidden", "someone"))
