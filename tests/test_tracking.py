"""Journals, and what becomes of them in the real MLflow on a fresh SQLite store: layout, reruns, kills, and each value once."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.data.prepared import Prepared
from ebjdat.models.modes import UnitRange
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import ModelSettings, Profile, flat
from ebjdat.tracking import background, journal
from ebjdat.tracking.runs import About, Subject, Tracker, numbers, track
from ebjdat.tracking.send import Outcome, Sender
from ebjdat.tracking.system import Sampler
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint, Header

TAGS = {"method": "eb_jdat", "git_commit": "abc", "params_hash": "p", "data_hash": "d", "protocol": "standard: Linf radius 0.15"}
DATA = {"name": "digits", "digest": "d", "source": "digits", "n_train": 3}
CURRENT = "tags.kind = 'result' and tags.superseded = 'false'"


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages journal here; the tests send, so that they know when it is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store's tables, made once: making them takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Sender(f"sqlite:///{path}").send([])
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def store(tmp_path: Path, empty_store: bytes) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def client(store: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store)


@pytest.fixture
def runs(client: Any) -> Callable[..., list[Any]]:
    def search(filter_string: str = "") -> list[Any]:
        return list(client.search_runs([client.get_experiment_by_name("digits").experiment_id], filter_string))

    return search


@pytest.fixture
def sync(store: str) -> Callable[[], Outcome]:
    def send() -> Outcome:
        outcome = Sender(store).send([*journal.unfinished(), *journal.finished()])
        assert outcome.errors == []
        return outcome

    return send


def stage(
    name: str, metrics: dict[str, Any], params: dict[str, Any] | None = None, seed: int = 0, tags: dict[str, str] | None = None
) -> None:
    params = params or {"training": {"lr": 0.1}}
    about = About(params, {**TAGS, "params_hash": json.dumps(params), **(tags or {})}, DATA)
    with track(Subject("digits", "eb_jdat", seed, name), about, Path(f"results/seed{seed}/{name}.journal.jsonl")) as tracker:
        tracker.metrics({"loss": 1.5, "skipped": "text"}, step=1)
        tracker.metrics({"loss": 0.5}, step=2)
        tracker.final(metrics)


def test_a_run_per_experiment_and_seed_with_everything_that_a_reader_asks_for(
    runs: Callable[..., list[Any]], client: Any, sync: Callable[[], Outcome], tmp_path: Path
) -> None:
    stage("finetune", {"train_seconds": 3.0})
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"png")
    about = About({"training": {"lr": 0.1}}, {**TAGS, "params_hash": json.dumps({"training": {"lr": 0.1}})}, DATA)
    with track(Subject("digits", "eb_jdat", 0, "attack"), about, Path("results/seed0/attack.journal.jsonl")) as tracker:
        tracker.final({"clean_acc": 0.9, "n_test": 100, "norm": "Linf", "ok": True})
        tracker.artifact(picture)
        tracker.tag("event_1", "epoch 3: diverged")
    stage("finetune", {"train_seconds": 4.0}, seed=1)
    sync()
    found = {r.info.run_name: r for r in runs(CURRENT)}
    assert set(found) == {"eb_jdat/seed0", "eb_jdat/seed1"}
    run = found["eb_jdat/seed0"]
    assert run.data.metrics == {"train_seconds": 3.0, "clean_acc": 0.9, "n_test": 100.0}
    assert run.data.params == {"training.lr": "0.1"}
    assert run.info.status == "FINISHED"
    expected = {**TAGS, "params_hash": '{"training": {"lr": 0.1}}', "experiment": "eb_jdat", "seed": "0", "event_1": "epoch 3: diverged"}
    expected |= {"state_finetune": "FINISHED", "state_attack": "FINISHED"}
    assert {key: run.data.tags.get(key) for key in expected} == expected
    (inputs,) = run.inputs.dataset_inputs
    assert (inputs.dataset.name, inputs.dataset.digest) == ("digits", "d")
    children = {c.data.tags["stage"]: c for c in runs(f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")}
    assert {c.info.run_name for c in children.values()} == {"eb_jdat/seed0/finetune", "eb_jdat/seed0/attack"}
    assert all(child.data.params == {} for child in children.values())  # the UI would write all of them over each picture
    finetune = children["finetune"]
    assert [(m.step, m.value) for m in client.get_metric_history(finetune.info.run_id, "loss")] == [(1, 1.5), (2, 0.5)]
    assert finetune.data.metrics["system/system_memory_usage_megabytes"] > 100
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["grid.png"]


def test_nothing_is_sent_twice_and_a_deleted_store_is_filled_again(
    runs: Callable[..., list[Any]], client: Any, sync: Callable[[], Outcome], empty_store: bytes, tmp_path: Path
) -> None:
    stage("finetune", {"train_seconds": 3.0})
    assert sync().values > 0
    before = {r.info.run_id: r.data.tags for r in runs()}
    assert sync() == Outcome()
    assert {r.info.run_id: r.data.tags for r in runs()} == before
    assert len(runs()) == 2
    (tmp_path / "elsewhere").mkdir()
    fresh = tmp_path / "elsewhere/mlflow.db"
    fresh.write_bytes(empty_store)
    Sender(f"sqlite:///{fresh}").send(journal.finished())
    from mlflow import MlflowClient

    other = MlflowClient(f"sqlite:///{fresh}")
    names = {r.info.run_name for r in other.search_runs([other.get_experiment_by_name("digits").experiment_id])}
    assert names == {"eb_jdat/seed0", "eb_jdat/seed0/finetune"}


def send_artifact(folder: Path, name: str) -> list[str]:
    """A stage in this folder with a file of this name, sent to the folder's store; what could not be sent."""
    (folder / name).write_text(name)
    with track(Subject("digits", name, 0, "attack"), About({}, TAGS), Path(f"results/{name}/attack.journal.jsonl")) as tracker:
        tracker.artifact(Path(name))
    return Sender("sqlite:///mlflow.db").send(journal.finished()).errors


def stored(folder: Path) -> set[str]:
    """Artifacts of all runs in this folder's store, as MLflow finds them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return {file.path for run in found for file in client.list_artifacts(run.info.run_id)}


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
    assert Sender(f"sqlite:///{moved / 'mlflow.db'}").send(journal.finished()).errors == []
    monkeypatch.chdir(moved)
    assert stored(moved) == {"a.txt", "b.txt", "c.txt", "d.txt"}


def test_a_store_with_fixed_addresses_is_not_written_to_from_another_place(
    empty_store: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions made them: they go on where they are; moved, they would write to where they were."""
    from mlflow import MlflowClient

    first, copy, third = tmp_path / "first one", tmp_path / "copy", tmp_path / "third"
    first.mkdir()
    (first / "mlflow.db").write_bytes(empty_store)
    MlflowClient(f"sqlite:///{first / 'mlflow.db'}").create_experiment("digits", (first / "mlartifacts").as_uri())
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


def test_a_rerun_updates_and_new_settings_supersede(runs: Callable[..., list[Any]], client: Any, sync: Callable[[], Outcome]) -> None:
    stage("finetune", {"train_seconds": 3.0})
    stage("attack", {"clean_acc": 0.8})
    sync()
    stage("finetune", {"train_seconds": 5.0})
    sync()
    (run,) = runs(CURRENT)
    assert run.data.metrics == {"train_seconds": 5.0, "clean_acc": 0.8}
    assert len(runs("tags.kind = 'result-stage' and tags.superseded = 'false'")) == 2
    assert len(runs("tags.kind = 'result-stage' and tags.superseded = 'true'")) == 1
    new = {"training": {"lr": 0.2}}
    stage("finetune", {"train_seconds": 6.0}, new)
    sync()
    (latest,) = runs(CURRENT)
    assert latest.info.run_id != run.info.run_id
    assert latest.data.params == {"training.lr": "0.2"}
    assert latest.data.metrics == {"train_seconds": 6.0}
    (old,) = runs("tags.kind = 'result' and tags.superseded = 'true'")
    assert old.info.run_name == "eb_jdat/seed0 (superseded)"
    # The report knows which results hold: here the attack's still do, and an earlier stage's figure.
    Path("energy.png").write_bytes(b"png")
    with track(
        Subject("digits", "report", 0, "report", "report"), About({}, {"data_hash": "d"}), Path("results/r.journal.jsonl")
    ) as tracker:
        hashes = {"params_hash": json.dumps(new), "data_hash": "d"}
        files = [Path("energy.png"), Path("missing.png")]
        tracker.result("eb_jdat", 0, hashes, {"clean_acc": 0.8, "train_seconds": 6.0}, files, Path("missing.safetensors"))
    sync()
    (latest,) = runs(CURRENT)
    assert [a.path for a in client.list_artifacts(latest.info.run_id)] == ["energy.png"]
    assert latest.data.metrics == {"train_seconds": 6.0, "clean_acc": 0.8}
    children = runs(f"tags.`mlflow.parentRunId` = '{latest.info.run_id}'")
    assert {c.data.tags["stage"] for c in children} == {"finetune", "attack"}
    assert latest.data.tags["state_attack"] == "FINISHED"


def test_other_data_make_another_run(runs: Callable[..., list[Any]], sync: Callable[[], Outcome]) -> None:
    """The settings are the same, but not the data set."""
    stage("finetune", {"train_seconds": 3.0})
    stage("attack", {"clean_acc": 0.8})
    sync()
    stage("finetune", {"train_seconds": 5.0}, tags={"data_hash": "e"})
    sync()
    (run,) = runs(CURRENT)
    assert run.data.tags["data_hash"] == "e"
    assert run.data.metrics == {"train_seconds": 5.0}
    (old,) = runs("tags.kind = 'result' and tags.superseded = 'true'")
    assert (old.data.tags["data_hash"], old.data.metrics) == ("d", {"train_seconds": 3.0, "clean_acc": 0.8})


def test_what_was_running_and_is_superseded_was_killed(runs: Callable[..., list[Any]], sync: Callable[[], Outcome]) -> None:
    """Its machine is gone, and its journal with it: nothing else will say how it ended."""
    gone = Tracker(Subject("digits", "eb_jdat", 0, "finetune"), About({"training": {"lr": 0.2}}, {**TAGS, "params_hash": "q"}))
    gone.metrics({"loss": 1.0}, 1)
    sync()
    assert {run.info.status for run in runs()} == {"RUNNING"}
    journal.unfinished()[0].unlink()
    gone.close("KILLED")
    stage("finetune", {"train_seconds": 3.0})
    sync()
    assert {(run.info.run_name, run.info.status) for run in runs()} == {
        ("eb_jdat/seed0", "FINISHED"),
        ("eb_jdat/seed0/finetune", "FINISHED"),
        ("eb_jdat/seed0 (superseded)", "KILLED"),
        ("eb_jdat/seed0/finetune (superseded)", "KILLED"),
    }


def test_what_arrives_late_does_not_replace_what_is_newer(runs: Callable[..., list[Any]], sync: Callable[[], Outcome]) -> None:
    """Results of another machine, begun before those that the store has."""
    stage("finetune", {"train_seconds": 3.0})
    late = Path("results/seed0/finetune.journal.jsonl").rename("late.jsonl")
    time.sleep(0.01)
    stage("finetune", {"train_seconds": 5.0}, {"training": {"lr": 0.2}})
    sync()
    late.rename("results/late.journal.jsonl")
    sync()
    (run,) = runs(CURRENT)
    assert run.data.metrics == {"train_seconds": 5.0}
    assert {(r.info.run_name, r.data.tags["superseded"]) for r in runs()} == {
        ("eb_jdat/seed0", "false"),
        ("eb_jdat/seed0/finetune", "false"),
        ("eb_jdat/seed0 (superseded)", "true"),
        ("eb_jdat/seed0/finetune (superseded)", "true"),
    }


def test_a_training_that_diverged_and_is_done_again_gets_a_run_of_its_own(
    runs: Callable[..., list[Any]], sync: Callable[[], Outcome]
) -> None:
    about = About({"a": 1}, TAGS)
    with track(Subject("digits", "eb_jdat", 0, "finetune"), about, Path("results/1.journal.jsonl")) as tracker:
        tracker.tag("event_1", "diverged")
        tracker.final({"recoveries": 1})
    with track(Subject("digits", "eb_jdat", 0, "finetune"), about, Path("results/2.journal.jsonl")) as tracker:
        tracker.final({"loss": 1})
    sync()
    (run,) = runs(CURRENT)
    assert run.data.metrics == {"loss": 1.0}
    assert "event_1" not in run.data.tags


def test_trials_of_dvc_keep_to_themselves(
    runs: Callable[..., list[Any]], sync: Callable[[], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage("finetune", {"train_seconds": 3.0})
    monkeypatch.setenv("DVC_EXP_NAME", "wavy-ovum")
    Path("results").rename("kept")
    stage("finetune", {"train_seconds": 5.0}, {"training": {"lr": 0.2}})
    Path("kept").rename("results/kept")
    sync()
    assert {r.info.run_name for r in runs(CURRENT)} == {"eb_jdat/seed0", "eb_jdat/seed0 [wavy-ovum]"}


def test_failures_are_marked(runs: Callable[..., list[Any]], sync: Callable[[], Outcome]) -> None:
    for error in (KeyboardInterrupt, ValueError):
        with (
            pytest.raises(error),
            track(Subject("digits", error.__name__, 0, "finetune"), About({}, TAGS), Path("results/x.journal.jsonl")),
        ):
            raise error
    assert not Path("results").exists()
    sync()
    assert {(r.data.tags["experiment"], r.info.status) for r in runs()} == {("KeyboardInterrupt", "KILLED"), ("ValueError", "FAILED")}
    assert [path.name[:9] for path in journal.unfinished()] == ["finetune-"]  # the one that can go on; the failed one was sent


ENDLESS = """
import sys, time
from pathlib import Path
from ebjdat.tracking.runs import About, Subject, track
with track(Subject("digits", "eb_jdat", 0, "finetune"), About({"a": 1}, %r), Path("results/f.journal.jsonl")) as tracker:
    for step in range(int(sys.argv[1])):
        tracker.metrics({"loss": 10.0 - step}, step)
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    tracker.final({"done": 1})
"""


def test_a_killed_stage_goes_on_in_its_run_with_each_point_once(
    runs: Callable[..., list[Any]], client: Any, sync: Callable[[], Outcome]
) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ENDLESS % TAGS, "3", "60"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout
    assert killed.stdout.readline() == "ready\n"
    (path,) = journal.unfinished()
    assert journal.is_written(path)
    sync()
    assert {r.info.status for r in runs()} == {"RUNNING"}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with path.open("a") as file:
        file.write('{"time": 1, "metr')  # killed in the middle of a line
    sync()
    assert {r.info.status for r in runs()} == {"KILLED"}
    subprocess.run([sys.executable, "-c", ENDLESS % TAGS, "5", "0"], check=True)
    sync()
    assert [r.info.run_name for r in runs("tags.kind = 'result-stage'")] == ["eb_jdat/seed0/finetune"]
    (run,) = runs("tags.kind = 'result-stage'")
    assert run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(s, 10.0 - s) for s in range(5)]
    stage_again = subprocess.run([sys.executable, "-c", ENDLESS % {**TAGS, "data_hash": "e"}, "2", "0"], check=False)
    assert stage_again.returncode == 0
    sync()
    assert len(runs("tags.kind = 'result-stage'")) == 2  # other data: an attempt of its own


def test_a_killed_stage_goes_on_only_with_the_same_settings_and_code() -> None:
    """The commit may be another one: it also changes with what a stage does not depend on."""
    code = Path("loss.py")
    code.write_text("first")

    def attempts(lr: float, commit: str = "abc") -> list[int]:
        """Begin, and be killed again. Returns how often each attempt so far was gone on with."""
        about = About({"lr": lr}, {**TAGS, "git_commit": commit}, code=[code])
        Tracker(Subject("digits", "eb_jdat", 0, "finetune"), about).close("KILLED")
        return sorted(sum("resumed" in event for event in journal.read(path)) for path in journal.unfinished())

    assert attempts(0.1) == [0]
    assert attempts(0.1, "def") == [1]
    assert attempts(0.2) == [0, 1]
    code.write_text("second")
    assert attempts(0.1) == [0, 0, 1]


def test_a_replaced_file_is_not_sent_as_what_it_was(runs: Callable[..., list[Any]], client: Any, sync: Callable[[], Outcome]) -> None:
    for name, status in (("same.txt", "kept"), ("other.txt", "kept")):
        Path(name).write_text(status)
    with track(Subject("digits", "eb_jdat", 0, "attack"), About({}, TAGS), Path("results/a.journal.jsonl")) as tracker:
        tracker.artifact(Path("same.txt"))
        tracker.artifact(Path("other.txt"))
    Path("other.txt").write_text("a later run's")
    sync()
    (run,) = runs(CURRENT)
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["same.txt"]


def test_pictures_over_training(runs: Callable[..., list[Any]], client: Any, sync: Callable[[], Outcome]) -> None:
    from ebjdat.stages.train import _png

    images = torch.arange(16 * 8 * 8, dtype=torch.uint8).reshape(16, 1, 8, 8)
    with track(Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS), Path("results/f.journal.jsonl")) as tracker:
        tracker.picture("replay_buffer", _png(images), 1)
        tracker.picture("replay_buffer", _png(images), 2)
    sync()
    (run,) = runs("tags.kind = 'result-stage'")
    files = [a.path for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
    assert sorted(f.split("+step+")[1][0] for f in files) == ["1", "2"]
    from PIL import Image

    shown = np.asarray(Image.open(client.download_artifacts(run.info.run_id, files[0])))
    assert shown.shape == (2 * 10 * 4, 8 * 10 * 4)
    assert np.array_equal(shown[4:36:4, 44:76:4], images[1, 0].numpy())  # second of the first row, each pixel four wide


def save_checkpoint(network: WideResNet, profile: Profile, digits: Prepared, path: Path) -> None:
    model = ModelSettings(depth=10, width=1)
    header = Header(
        "eb_jdat/seed0", "digits", "eb_jdat", 0, model, profile.training_settings("eb_jdat"), (1, 8, 8), digits.classes, "d", "p", "c", {}
    )
    checkpoint.save(Checkpoint(header, network.state_dict(), None, None), path)


def test_the_logged_model_classifies_images_in_the_unit_range(
    runs: Callable[..., list[Any]], sync: Callable[[], Outcome], digits: Prepared, profile: Profile, network: WideResNet
) -> None:
    save_checkpoint(network, profile, digits, Path("c.safetensors"))
    with track(Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS), Path("results/f.journal.jsonl")) as tracker:
        tracker.model(Path("c.safetensors"))
    sync()
    import mlflow

    (run,) = runs(CURRENT)
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    images = digits.images[:7].astype(np.float32) / 255
    with torch.no_grad():
        logits = UnitRange(network).eval()(torch.from_numpy(images))
    found = loaded.predict(images)
    assert list(found["class"]) == logits.argmax(1).tolist()
    assert list(found["name"]) == [digits.classes[i] for i in logits.argmax(1)]
    np.testing.assert_allclose(found["probability"], logits.softmax(1).amax(1), rtol=1e-5)
    np.testing.assert_allclose(found["energy"], -logits.logsumexp(1), rtol=1e-5)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    assert loaded.input_example is not None
    # Other settings of an evaluation: a new run, whose training is the old one's.
    with track(Subject("digits", "eb_jdat", 0, "energy"), About({}, {**TAGS, "params_hash": "q"}), Path("results/e.journal.jsonl")):
        pass
    with track(
        Subject("digits", "report", 0, "report", "report"), About({}, {"data_hash": "d"}), Path("results/r.journal.jsonl")
    ) as tracker:
        tracker.result("eb_jdat", 0, {"params_hash": "q", "data_hash": "d"}, {}, [], Path("c.safetensors"))
    sync()
    (new,) = runs(CURRENT)
    assert new.info.run_id != run.info.run_id
    again = mlflow.pyfunc.load_model(f"runs:/{new.info.run_id}/model")
    assert list(again.predict(images)["class"]) == list(found["class"])
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] are needed, found 0 to 255"):
        loaded.predict(images * 255)


def test_four_processes_on_a_store_that_does_not_exist_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `snakemake --cores 4`, with the process that sends beside them."""
    code = (
        "import sys, time; from pathlib import Path; from ebjdat.tracking.runs import About, Subject, track\n"
        "subject, name = Subject('digits', 'e' + sys.argv[1], 0, 'finetune'), f'results/{sys.argv[1]}.journal.jsonl'\n"
        "with track(subject, About({'a': 1}, {}), Path(name)) as t:\n"
        "    for step in range(50): t.metrics({'loss': step}, step); time.sleep(0.01)\n"
        "    t.final({'done': 1})"
    )
    environment = {**os.environ, "EBJDAT_TRACKING": "1"}
    started = [subprocess.Popen([sys.executable, "-c", code, str(i)], stderr=subprocess.PIPE, text=True, env=environment) for i in range(4)]
    assert [p.communicate()[1] for p in started] == [""] * 4
    deadline = time.monotonic() + 90
    while journal.unfinished() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not journal.unfinished(), Path("logs/tracking.log").read_text()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    everything = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert sorted(r.info.run_name for r in everything) == sorted(f"e{i}/seed0{part}" for i in range(4) for part in ("", "/finetune"))
    for run in everything:
        if "stage" in run.data.tags:
            assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(50))
        assert run.data.metrics["done"] == 1.0
    assert not journal.unfinished()


def full_disk(*arguments: object, **named: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_stops_tracking_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path("results/e.journal.jsonl")
    with pytest.MonkeyPatch.context() as patch, track(Subject("digits", "e", 0, "finetune"), About({}, TAGS), copy) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        patch.setattr(journal.Journal, "write", full_disk)
        tracker.metrics({"loss": 1.0}, 2)
        tracker.final({"x": 1})
    assert capsys.readouterr().err.count("WARNING: tracking stops for this stage") == 1
    events = journal.read(copy)  # an output of the stage: it is there, with what could be written
    assert [event["step"] for event in events if "metrics" in event] == [1]
    assert events[-1]["end"] == "FINISHED"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "__init__", full_disk)
        with track(Subject("digits", "f", 0, "finetune"), About({}, TAGS), Path("results/f.journal.jsonl")) as tracker:
            tracker.metrics({"loss": 1.0}, 1)
    assert Path("results/f.journal.jsonl").read_text() == ""
    told = Sender("sqlite:///unused.db").send([Path("results/f.journal.jsonl")])
    assert told == Outcome(notes=["results/f.journal.jsonl: empty; its stage could write none when it ran, or it was damaged"])


LIMITED = """
import resource, signal, sys
from pathlib import Path
from ebjdat.tracking.runs import About, Subject, track
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with track(Subject("digits", "e", 0, "finetune"), About({}, {}), Path("results/e.journal.jsonl")) as tracker:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    for step in range(5):
        tracker.picture("samples", bytes(2000), step)
        if step == 3 and sys.argv[1] == "freed":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    tracker.final({"x": 1})
print("results go on")
"""


@pytest.mark.parametrize("then", ["full", "freed"])
def test_a_line_that_fits_on_the_disk_in_part_stops_tracking_and_nothing_else(then: str) -> None:
    """No file may grow beyond 10 kB: the system writes what fits of a line, and refuses the next."""
    done = subprocess.run([sys.executable, "-c", LIMITED, then], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "results go on\n"), done.stderr
    assert done.stderr.count("\n") == done.stderr.count("WARNING: tracking stops for this stage") == 1
    begin, *pictures, end = journal.read(Path("results/e.journal.jsonl"))
    assert "begin" in begin
    assert [event["step"] for event in pictures] == [0, 1, 2]
    assert end["end"] == "FINISHED"


class Lossy:
    """A client whose call number `fatal` fails: before it is done, or after, when its answer gets lost."""

    def __init__(self, client: Any, fatal: int, after: bool) -> None:
        self.client, self.fatal, self.after = client, fatal, after
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fatal and not self.after:
                raise ConnectionError("lost")
            result = method(*arguments, **named)
            if len(self.calls) == self.fatal:
                raise ConnectionError("lost")
            return result

        return call


def content(uri: str) -> list[Any]:
    """Everything in a store that a reader sees, without ids."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    found = []
    for run in runs:
        tags = {k: names.get(v, v) for k, v in run.data.tags.items()}
        curves = {k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)] for k in ("loss", "acc")}
        data = [given.dataset.digest for given in run.inputs.dataset_inputs]
        files = sorted(a.path.split("+timestamp")[0] for place in ("", "images") for a in client.list_artifacts(run.info.run_id, place))
        found.append((run.info.run_name, run.info.status, tags, run.data.params, curves, data, files))
    return sorted(found, key=str)


def sent_with_a_loss(paths: list[Path], store: Path, fatal: int, after: bool) -> list[str]:
    """Send, lose that call, send again, by the same sender or another. Returns the calls of the first time."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{store}"
    first = Sender(uri)
    first._client = lossy = Lossy(MlflowClient(uri), fatal, after)
    outcome = first.send(paths)
    assert bool(outcome.errors) == (fatal > 0)
    assert (first if fatal % 4 < 2 else Sender(uri)).send(paths).errors == []
    return lossy.calls


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.torture), pytest.param(3, marks=pytest.mark.torture)])
def test_whichever_call_is_lost_everything_arrives_and_each_once(empty_store: bytes, tmp_path: Path, first: int) -> None:
    """Every third call of sending two attempts of a stage fails in turn, before or after it is done; then it is sent again.

    The others: `pytest -m torture tests/test_tracking.py`.
    """
    from ebjdat.stages.train import _png

    Path("figure.txt").write_text("a figure")
    for lr in (0.1, 0.2):
        tags = {**TAGS, "params_hash": str(lr)}
        where = Path(f"results/{lr}.journal.jsonl")
        with track(Subject("digits", "eb_jdat", 0, "finetune"), About({"lr": lr}, tags, DATA), where) as tracker:
            tracker.metrics({"loss": 1.5}, 1)
            tracker.tag("event_1", "diverged")
            tracker.artifact(Path("figure.txt"))
            if lr == 0.1:
                tracker.picture("samples", _png(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), 1)
            tracker.metrics({"loss": 0.5}, 2)
            tracker.final({"acc": 0.9})
    paths = list(journal.finished())

    def sent(fatal: int, after: bool) -> tuple[list[Any], int]:
        store = tmp_path / f"{fatal}{after}/mlflow.db"
        store.parent.mkdir()
        store.write_bytes(empty_store)
        calls = sent_with_a_loss(paths, store, fatal, after)
        return content(f"sqlite:///{store}"), len(calls)

    expected, calls = sent(0, after=False)
    assert len(expected) == 4
    assert calls > 30
    for fatal in range(first, calls + 1, 3):
        found, _ = sent(fatal, after=fatal % 2 > 0)
        assert found == expected, f"call {fatal} of {calls}"


def test_a_model_is_logged_once_whichever_call_is_lost(
    empty_store: bytes, tmp_path: Path, network: WideResNet, profile: Profile, digits: Prepared
) -> None:
    """Every call from the one on that asks for a model fails in turn, before it is done; then all is sent again."""
    from mlflow import MlflowClient

    save_checkpoint(network, profile, digits, Path("c.safetensors"))
    with track(Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS), Path("results/f.journal.jsonl")) as tracker:
        tracker.model(Path("c.safetensors"))

    def sent(fatal: int) -> list[str]:
        store = tmp_path / f"{fatal}/mlflow.db"
        store.parent.mkdir()
        store.write_bytes(empty_store)
        calls = sent_with_a_loss(list(journal.finished()), store, fatal, after=False)
        client = MlflowClient(f"sqlite:///{store}")
        assert len(client.search_logged_models([client.get_experiment_by_name("digits").experiment_id])) == 1, f"call {fatal} of {calls}"
        return calls

    calls = sent(0)
    for fatal in range(calls.index("get_run") + 1, len(calls) + 1):
        sent(fatal)


def test_more_values_than_one_call_takes(runs: Callable[..., list[Any]], sync: Callable[[], Outcome]) -> None:
    with track(Subject("digits", "eb_jdat", 0, "attack"), About({}, TAGS), Path("results/a.journal.jsonl")) as tracker:
        tracker.metrics({f"m{i}": i for i in range(890)}, 1)
        tracker.final({f"f{i}": i for i in range(1200)})
    sync()
    (child,) = runs("tags.kind = 'result-stage'")
    (parent,) = runs(CURRENT)
    assert len([name for name in child.data.metrics if not name.startswith("system/")]) == 890 + 1200
    assert len(parent.data.metrics) == 1200


def test_a_training_that_is_begun_anew_has_a_journal_of_its_own(runs: Callable[..., list[Any]], client: Any, sync: Any) -> None:
    """Its state was damaged or made on other threads: the points of the killed attempt are not its own."""
    subject, about = Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS)
    killed = Tracker(subject, about)
    killed.metrics({"loss": 1.0}, 1)
    killed.close("KILLED")
    with track(subject, about, Path("results/f.journal.jsonl")) as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 3.0}, 2)
    sync()
    new, old = sorted(runs("tags.kind = 'result-stage'"), key=lambda run: run.data.tags["superseded"])
    assert [m.value for m in client.get_metric_history(new.info.run_id, "loss")] == [2.0, 3.0]
    assert [m.value for m in client.get_metric_history(old.info.run_id, "loss")] == [1.0]
    assert (new.info.status, old.info.status, old.data.tags["superseded"]) == ("FINISHED", "KILLED", "true")
    assert not journal.unfinished()


def test_a_point_that_is_not_a_number_is_the_same_when_it_is_measured_again() -> None:
    """As a training that diverged has it: what continues from there does not begin anew."""
    subject, about = Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS)
    points = [{"loss": 1.0, "acc": 0.1}, {"loss": math.nan, "acc": 0.1}, {"loss": math.inf, "acc": 0.1}]
    killed = Tracker(subject, about)
    for step, point in enumerate(points):
        killed.metrics(point, step)
    killed.close("KILLED")
    again = Tracker(subject, about)
    for step, point in enumerate([*points, {"loss": 2.0}]):
        again.metrics(point, step)
    again.close("KILLED")
    (path,) = journal.unfinished()
    assert [event["step"] for event in journal.read(path) if "metrics" in event] == [0, 1, 2, 3]


def test_results_that_came_back_are_current_again(runs: Callable[..., list[Any]], sync: Any, store: str) -> None:
    """As `dvc checkout` of an older commit does, and `ebjdat sync` after it."""
    stage("finetune", {"x": 1})
    first = Path("results/seed0/finetune.journal.jsonl").read_bytes()
    stage("finetune", {"x": 2}, {"training": {"lr": 0.2}})
    (Path("results") / "first.journal.jsonl").write_bytes(first)
    sync()
    assert [run.data.metrics["x"] for run in runs(CURRENT)] == [2]
    Path("results/seed0/finetune.journal.jsonl").unlink()
    Sender(store).adopt(journal.finished())
    (current,) = runs(CURRENT)
    assert (current.data.metrics["x"], current.info.run_name) == (1, "eb_jdat/seed0")
    (child,) = runs("tags.kind = 'result-stage' and tags.superseded = 'false'")
    assert child.data.tags["mlflow.parentRunId"] == current.info.run_id


def test_a_store_that_lost_everything_is_filled_again_by_who_knew_it(
    runs: Callable[..., list[Any]], client: Any, store: str, empty_store: bytes
) -> None:
    """One failed pass, after which nothing that the sender remembers of the store is relied on."""
    sender = Sender(store)
    tracker = Tracker(Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS))
    tracker.metrics({"loss": 2.0}, 1)
    assert sender.send(journal.unfinished()).errors == []
    Path("empty.db").write_bytes(empty_store)
    with sqlite3.connect("empty.db") as empty, sqlite3.connect("mlflow.db") as filled:
        empty.backup(filled)  # also under those who have it open
    tracker.metrics({"loss": 1.0}, 2)
    assert len(sender.send(journal.unfinished()).errors) == 1
    assert sender.send(journal.unfinished()).errors == []
    tracker.close("KILLED")
    assert len(runs(CURRENT)) == 1
    (run,) = runs("tags.kind = 'result-stage'")
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [2.0, 1.0]


def test_a_damaged_journal_is_named_and_the_others_are_sent(runs: Callable[..., list[Any]], store: str) -> None:
    Path("results").mkdir()
    Path("results/bad.journal.jsonl").write_text("not JSON\n")
    stage("finetune", {"x": 1})
    outcome = Sender(store).send(journal.finished())
    assert [error.split(":")[0] for error in outcome.errors] == ["results/bad.journal.jsonl"]
    assert [run.data.metrics["x"] for run in runs(CURRENT)] == [1]


def test_a_journal_that_the_store_does_not_take_is_named(store: str) -> None:
    stage("finetune", {"x$": 1})  # no name of a metric to MLflow
    (path,) = journal.finished()
    (error,) = Sender(store).send([path]).errors
    assert error.startswith(f"{path}: MlflowException: ")


def test_journals_of_one_store_are_not_sent_to_another_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("sqlite:///a.db", "sqlite:///b.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match="failed"), track(Subject("digits", "e", 0, "finetune"), About({}, TAGS)):
            raise ValueError("failed")
        assert len(journal.unfinished(background.store())) == 1
    assert len(journal.unfinished()) == 2


def test_samples_of_the_machine_come_at_their_time_and_at_the_end() -> None:
    found: list[dict[str, float]] = []
    with Sampler(found.append, seconds=0.1):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            sum(range(1000))
    assert len(found) >= 2
    assert all(0 < sample["system/system_memory_usage_percentage"] < 100 for sample in found)
    assert found[0]["system/process_cpu_utilization_percentage"] > 10


WITHOUT_MLFLOW = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from ebjdat.cli import app
app(["sync"])
"""


def test_without_mlflow_sync_says_so_and_keeps_the_journals() -> None:
    """As on a machine that only trains."""
    stage("finetune", {"x": 1})
    done = subprocess.run([sys.executable, "-c", WITHOUT_MLFLOW], capture_output=True, text=True, check=False)
    told = "error: nothing can be sent from here: mlflow is not installed (`make install` does it). Every journal is kept\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)
    assert len(list(journal.finished())) == 1


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://someone:SECRET@127.0.0.1:5432/mlflow?password=SECRET&sslmode=require", "postgresql://127.0.0.1:5432/mlflow"),
        ("http://someone:SECRET@127.0.0.1:9", "http://127.0.0.1:9"),
        ("https://host:5000/a/b?api_key=SECRET#SECRET", "https://host:5000/a/b"),
        ("https://host/a;token=SECRET", "https://host/a"),
        ("https://SECRET@[::1]:5000/x", "https://[::1]:5000/x"),
        ("http://someone:SEC/SECRET@host/x", "http://…"),
        ("http://someone:p?SECRET@host/x", "http://…"),
        ("http://host/?token=a@SECRET", "http://…"),
        ("http://host:SECRET/x", "http://…"),
        ("SECRET@host", "host"),
        ("someone:SECRET@host:80/x", "host:80/x"),
        ("someone:SECRET@host?x=@SECRET", "…"),
        ("databricks", "databricks"),
        ("databricks://SECRET", "databricks://…"),
        ("databricks://someone:SECRET@adb-1.azuredatabricks.net", "databricks://…"),
        ("uc:SECRET", "…"),
        ("s3://SECRET@bucket/x", "s3://…"),
        ("sqlite+pysqlcipher://:SECRET@//folder/x.db?cipher=SECRET", "sqlite+pysqlcipher:////folder/x.db"),
        ("sqlite:////folder/x.db", "sqlite:////folder/x.db"),
        ("/folder/mlruns", "/folder/mlruns"),
        ("localhost:5000", "localhost:5000"),
        ("http://host/\x1b[2J", "http://host/\\x1b[2J"),
    ],
)
def test_of_an_address_only_scheme_host_and_path_are_shown(monkeypatch: pytest.MonkeyPatch, address: str, shown: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert background.shown_uri() == shown
    for text in (f"no answer from {address}: refused", f"url: /?{address.partition('?')[2]}/api/2.0", f"('{address}')"):
        assert "SECRET" not in background.without_secrets(text)


def test_secrets_are_not_in_what_other_programs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host/?api_key=hunter22")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "dapi0123")
    told = "url: /?api_key=hunter22/api (hunter22, Bearer dapi0123), access_key='AKIA1', me:pw@other.net, https://a:b@c.d/e?sig=1 failed"
    kept = background.without_secrets(told)
    assert not any(secret in kept for secret in ("hunter22", "dapi0123", "AKIA1", "me:pw", "a:b@", "sig=1"))
    assert all(word in kept for word in ("other.net", "https://c.d/e", "failed"))


def test_a_server_that_cannot_be_reached_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9/?api_key=hidden")
    stage("finetune", {"x": 1})
    outcome = Sender(background.tracking_uri()).send(journal.finished())
    assert len(outcome.errors) == 1
    assert not any(secret in outcome.errors[0] for secret in ("secret", "hidden", "someone"))


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("sqlite:///folder", "folder is a folder; name a file: sqlite:///folder/mlflow.db"),
        ("sqlite:///{here}/folder", "is a folder"),
        ("sqlite+pysqlite:///folder?timeout=5", "is a folder"),
        ("sqlite:///fifo", "is no plain file"),
        ("sqlite:///nowhere/mlflow.db", "the folder nowhere is not there"),
        ("sqlite:///notes.txt", "notes.txt is no SQLite database"),
        ("sqlite://", "in memory keeps nothing"),
        ("sqlite:///:memory:", "in memory keeps nothing"),
        ("sqlite:///file:x.db?mode=ro&uri=true", "says that nothing may be written"),
        ("sqlite:////proc/version", "cannot be written|is no SQLite database"),
        (f"sqlite:///{'a' * 300}", "File name too long"),
    ],
)
def test_a_file_that_cannot_take_anything_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, why: str) -> None:
    """Before MLflow sees it, which would try for minutes; every journal is kept."""
    Path("folder").mkdir()
    os.mkfifo("fifo")
    Path("notes.txt").write_text("twenty characters of text")
    stage("finetune", {"x": 1})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(here=tmp_path))
    began = time.monotonic()
    told = CliRunner().invoke(app, ["sync"])
    assert told.exit_code == 1
    assert re.search(why, told.output)
    assert "Every journal is kept" in told.output
    assert time.monotonic() - began < 2
    assert len(list(journal.finished())) == 1


def test_an_address_that_no_file_can_have_stops_no_stage(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EBJDAT_TRACKING", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{'a' * 300}")
    with track(Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS), Path("results/f.journal.jsonl")) as tracker:
        tracker.metrics({"loss": 2.0}, 1)
    assert journal.read(Path("results/f.journal.jsonl"))
    assert "File name too long" in capfd.readouterr().err


def test_what_a_store_refuses_after_everything_was_sent_is_one_line(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    """A server that lets runs be read, not changed."""
    from mlflow.exceptions import MlflowException

    stage("finetune", {"x": 1})

    def refuse(*_: object) -> None:
        raise MlflowException("403 for someone:secret\nand more")

    monkeypatch.setattr(Sender, "_adopt", refuse)
    told = CliRunner().invoke(app, ["sync"])
    assert (told.exit_code, type(told.exception)) == (1, SystemExit)
    assert "MlflowException: 403 for" in told.output
    assert "They are kept" in told.output


def test_a_stage_says_at_its_end_that_the_store_cannot_take_anything(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And no process is started that would wait for it."""
    monkeypatch.setenv("EBJDAT_TRACKING", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///folder?key=SECRET")
    Path("folder").mkdir()
    stage("finetune", {"x": 1})
    told = capfd.readouterr().err
    assert "nothing could be sent to sqlite:///folder since" in told
    assert "is a folder; name a file" in told
    assert "SECRET" not in told
    assert not background.LOG.exists()
    assert len(journal.unfinished()) == 1


def test_a_database_that_is_not_there_is_said_at_once() -> None:
    stage("finetune", {"x": 1})
    for address in ("postgresql://someone:secret@127.0.0.1:9/mlflow", "mysql+nodriver://someone:secret@127.0.0.1:9/mlflow"):
        began = time.monotonic()
        outcome = Sender(address).send(journal.finished())
        assert len(outcome.errors) == 1
        assert outcome.errors[0].startswith("TrackingError: ")
        assert "secret" not in outcome.errors[0]
        assert time.monotonic() - began < 10


BEGIN = {"time": 1, "begin": {"run": "r", "name": "n", "seed": 0, "stage": "s", "kind": "result", "id": "i", "dvc_exp": "", "host": "h"}}
BEGIN |= {"params": {}, "tags": {}, "data": None}


@pytest.mark.parametrize(
    "lines",
    [
        b"not JSON\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"time": "now"}\n',
        b'{"time": 1, "begin": 3}\n',
        b'{"time": 1, "end": "FINISHED"}\n',
        json.dumps({**BEGIN, "begin": {**BEGIN["begin"], "seed": "0"}}).encode() + b"\n",  # type: ignore[dict-item]
        json.dumps({**BEGIN, "params": {"a": [1]}}).encode() + b"\n",
        *(
            json.dumps(BEGIN).encode() + b"\n" + json.dumps({"time": 2, **event}).encode() + b"\n"
            for event in (
                {"metrics": {"loss": "low"}, "step": 1},
                {"metrics": [1], "step": 1},
                {"metrics": {"loss": 1}, "step": "x"},
                {"tag": "x"},
                {"artifact": 3, "sha256": "x"},
                {"result": {"name": "x"}},
                {"end": "MAYBE"},
                BEGIN,
                {"end": "FINISHED", "sha256": "0" * 64},
            )
        ),
    ],
)
def test_a_damaged_journal_is_named_with_its_line(lines: bytes) -> None:
    path = Path("results/bad.journal.jsonl")
    path.parent.mkdir()
    path.write_bytes(lines)
    with pytest.raises(ValueError, match=r"^line [12]: "):
        journal.read(path)
    outcome = Sender("sqlite:///mlflow.db").send(journal.finished())
    assert len(outcome.errors) == 1
    assert re.match(r"results/bad\.journal\.jsonl: cannot be read \(line [12]: .*\); delete it if it is damaged$", outcome.errors[0])


def test_a_finished_journal_that_changed_is_told() -> None:
    """A digit of a number that became another, a line that is gone, the end that is, or everything."""
    path = Path("results/f.journal.jsonl")
    with track(Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS), path) as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 3.0}, 2)
    for unfinished in journal.unfinished():
        unfinished.unlink()
    whole = path.read_bytes()
    first, *rest = whole.splitlines(keepends=True)
    sealed = r"line \d: its sha256 is of other lines than those before it"
    damages = {
        whole.replace(b"2.0", b"2.5"): sealed,
        first + b"".join(rest[1:]): sealed,
        whole[:-3]: "has no end",
        whole[:40]: "has no end",
        whole + whole: "begins again",
    }
    for content, told in damages.items():
        path.write_bytes(content)
        outcome = Sender("sqlite:///mlflow.db").send(journal.finished())
        assert (outcome.journals, len(outcome.errors)) == (0, 1)
        assert re.match(rf"{path}: cannot be read \(.*{told}\); delete it if it is damaged$", outcome.errors[0])
    path.write_bytes(b"")
    outcome = Sender("sqlite:///mlflow.db").send(journal.finished())
    assert (outcome.journals, outcome.errors) == (0, [])
    assert outcome.notes == [f"{path}: empty; its stage could write none when it ran, or it was damaged"]
    path.write_bytes(whole)
    assert Sender("sqlite:///mlflow.db").send(journal.finished()).journals == 1


def test_a_journal_of_more_than_anybody_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("big.journal.jsonl")
    path.write_bytes(json.dumps(BEGIN).encode() + b"\n" + b'{"time": 1}\n' * 3)
    assert len(journal.read(path)) == 4
    assert len(journal.read(path, most=1)) == 1
    monkeypatch.setattr(journal, "MOST_EVENTS", 3)
    with pytest.raises(ValueError, match="more than 3 lines"):
        journal.read(path)
    with path.open("ab") as file:
        file.truncate(journal.LARGEST + 1)  # of zeros, which take no room
    with pytest.raises(ValueError, match="bytes; 67,108,864 are allowed"):
        journal.read(path)


def test_a_stage_goes_on_beside_a_damaged_journal_of_its_own() -> None:
    subject, about = Subject("digits", "eb_jdat", 0, "finetune"), About({}, TAGS)
    Tracker(subject, about).close("KILLED")
    (path,) = journal.unfinished()
    path.write_bytes(path.read_bytes() + b"junk\n")
    with track(subject, about, Path("results/f.journal.jsonl")) as tracker:
        tracker.metrics({"loss": 2.0}, 1)
    assert [event["metrics"] for event in journal.read(Path("results/f.journal.jsonl")) if "metrics" in event] == [{"loss": 2.0}]
    assert journal.unfinished() == [path]  # for whoever wants to look at it


def test_journals_that_are_no_files_are_left_alone() -> None:
    Path("results").mkdir()
    os.mkfifo("results/a.journal.jsonl")
    Path("results/b.journal.jsonl").symlink_to("/dev/zero")
    assert list(journal.finished()) == []


def test_flat_and_numbers() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": [1]}) == {"a.b": 1, "a.c.d": 2, "e": [1]}
    assert numbers({"a": 1, "b": True, "c": "x", "d": 0.5, "e": None}) == {"a": 1.0, "d": 0.5}
