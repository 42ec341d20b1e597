"""Journals in the real MLflow on an SQLite store: layout, reruns, losses, and each value once."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import Profile
from ebjdat.tracking import journal
from ebjdat.tracking.publish import Outcome, Publisher
from ebjdat.tracking.tracker import About, Subject, Tracker, track

from .conftest import ABOUT, CURRENT, DATA, STAGES, SUBJECT, TAGS, Mlflow, run_stage, tracked
from .test_mlflow_model import save_checkpoint


def test_a_run_per_experiment_and_seed_with_everything_that_a_reader_asks_for(store: Mlflow, tmp_path: Path) -> None:
    run_stage("finetune", {"train_seconds": 3.0})
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"png")
    about = About({"training": {"lr": 0.1}}, {**TAGS, "params_hash": json.dumps({"training": {"lr": 0.1}})}, DATA)
    with track(Subject("digits", "eb_jdat", 0, "attack"), about, Path("results/seed0/attack.journal.jsonl")) as tracker:
        tracker.final({"clean_acc": 0.9, "n_test": 100, "norm": "Linf", "ok": True})
        tracker.artifact(picture)
        tracker.tag("event_1", "epoch 3: diverged")
    run_stage("finetune", {"train_seconds": 4.0}, seed=1)
    store.sync()
    found = {r.info.run_name: r for r in store.runs(CURRENT)}
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
    children = {c.data.tags["stage"]: c for c in store.runs(f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")}
    assert {c.info.run_name for c in children.values()} == {"eb_jdat/seed0/finetune", "eb_jdat/seed0/attack"}
    assert all(child.data.params == {} for child in children.values())  # the UI would write all of them over each picture
    finetune = children["finetune"]
    assert store.curve(finetune) == [(1, 1.5), (2, 0.5)]
    assert finetune.data.metrics["system/system_memory_usage_megabytes"] > 100
    assert store.artifacts(run) == ["grid.png"]


def test_nothing_is_sent_twice_and_a_deleted_store_is_filled_again(store: Mlflow, empty_store: bytes, tmp_path: Path) -> None:
    run_stage("finetune", {"train_seconds": 3.0})
    assert store.sync().values > 0
    before = {r.info.run_id: r.data.tags for r in store.runs()}
    assert store.sync() == Outcome()
    assert {r.info.run_id: r.data.tags for r in store.runs()} == before
    assert len(store.runs()) == 2
    (tmp_path / "elsewhere").mkdir()
    other = Mlflow(tmp_path / "elsewhere/mlflow.db")
    other.path.write_bytes(empty_store)
    other.sync()
    assert content(other) == content(store)


@pytest.mark.parametrize("deleted", ["eb_jdat/seed0", "eb_jdat/seed0/finetune"])
def test_a_deleted_run_is_filled_again(store: Mlflow, deleted: str) -> None:
    run_stage("finetune", {"train_seconds": 3.0})
    run_stage("attack", {"clean_acc": 0.9})
    store.sync()
    before = content(store)
    (run,) = (run for run in store.runs() if run.info.run_name == deleted)
    store.client.delete_run(run.info.run_id)
    store.sync()
    assert content(store) == before
    assert store.sync() == Outcome()


def test_a_rerun_updates_and_new_settings_supersede(store: Mlflow) -> None:
    run_stage("finetune", {"train_seconds": 3.0})
    run_stage("attack", {"clean_acc": 0.8})
    store.sync()
    run_stage("finetune", {"train_seconds": 5.0})
    store.sync()
    (run,) = store.runs(CURRENT)
    assert run.data.metrics == {"train_seconds": 5.0, "clean_acc": 0.8}
    assert len(store.runs("tags.kind = 'result-stage' and tags.superseded = 'false'")) == 2
    assert len(store.runs("tags.kind = 'result-stage' and tags.superseded = 'true'")) == 1
    new = {"training": {"lr": 0.2}}
    run_stage("finetune", {"train_seconds": 6.0}, new)
    store.sync()
    (latest,) = store.runs(CURRENT)
    assert latest.info.run_id != run.info.run_id
    assert latest.data.params == {"training.lr": "0.2"}
    assert latest.data.metrics == {"train_seconds": 6.0}
    (old,) = store.runs("tags.kind = 'result' and tags.superseded = 'true'")
    assert old.info.run_name == "eb_jdat/seed0 (superseded)"
    # The report knows which results hold: here the attack's still do, and an earlier stage's figure.
    Path("energy.png").write_bytes(b"png")
    with track(
        Subject("digits", "report", 0, "report", "report"), About({}, {"data_hash": "d"}), Path("results/r.journal.jsonl")
    ) as tracker:
        hashes = {"params_hash": json.dumps(new), "data_hash": "d"}
        files = [Path("energy.png"), Path("missing.png")]
        tracker.result("eb_jdat", 0, hashes, {"clean_acc": 0.8, "train_seconds": 6.0}, files, Path("missing.safetensors"))
    store.sync()
    (latest,) = store.runs(CURRENT)
    assert store.artifacts(latest) == ["energy.png"]
    assert latest.data.metrics == {"train_seconds": 6.0, "clean_acc": 0.8}
    children = store.runs(f"tags.`mlflow.parentRunId` = '{latest.info.run_id}'")
    assert {c.data.tags["stage"] for c in children} == {"finetune", "attack"}
    assert latest.data.tags["state_attack"] == "FINISHED"


def test_other_data_make_another_run(store: Mlflow) -> None:
    """The settings are the same, but not the data set."""
    run_stage("finetune", {"train_seconds": 3.0})
    run_stage("attack", {"clean_acc": 0.8})
    store.sync()
    run_stage("finetune", {"train_seconds": 5.0}, tags={"data_hash": "e"})
    store.sync()
    (run,) = store.runs(CURRENT)
    assert run.data.tags["data_hash"] == "e"
    assert run.data.metrics == {"train_seconds": 5.0}
    (old,) = store.runs("tags.kind = 'result' and tags.superseded = 'true'")
    assert (old.data.tags["data_hash"], old.data.metrics) == ("d", {"train_seconds": 3.0, "clean_acc": 0.8})


def test_what_was_running_and_is_superseded_was_killed(store: Mlflow) -> None:
    """Its machine is gone, and its journal with it: nothing else will say how it ended."""
    gone = Tracker(Subject("digits", "eb_jdat", 0, "finetune"), About({"training": {"lr": 0.2}}, {**TAGS, "params_hash": "q"}))
    gone.metrics({"loss": 1.0}, 1)
    store.sync()
    assert {run.info.status for run in store.runs()} == {"RUNNING"}
    journal.unfinished()[0].unlink()
    gone.close("KILLED")
    run_stage("finetune", {"train_seconds": 3.0})
    store.sync()
    assert {(run.info.run_name, run.info.status) for run in store.runs()} == {
        ("eb_jdat/seed0", "FINISHED"),
        ("eb_jdat/seed0/finetune", "FINISHED"),
        ("eb_jdat/seed0 (superseded)", "KILLED"),
        ("eb_jdat/seed0/finetune (superseded)", "KILLED"),
    }


def test_what_arrives_late_does_not_replace_what_is_newer(store: Mlflow) -> None:
    """Results of another machine, begun before those that the store has."""
    run_stage("finetune", {"train_seconds": 3.0})
    late = Path("results/seed0/finetune.journal.jsonl").rename("late.jsonl")
    time.sleep(0.01)
    run_stage("finetune", {"train_seconds": 5.0}, {"training": {"lr": 0.2}})
    store.sync()
    late.rename("results/late.journal.jsonl")
    store.sync()
    (run,) = store.runs(CURRENT)
    assert run.data.metrics == {"train_seconds": 5.0}
    assert {(r.info.run_name, r.data.tags["superseded"]) for r in store.runs()} == {
        ("eb_jdat/seed0", "false"),
        ("eb_jdat/seed0/finetune", "false"),
        ("eb_jdat/seed0 (superseded)", "true"),
        ("eb_jdat/seed0/finetune (superseded)", "true"),
    }


def test_an_attempt_that_is_published_late_does_not_replace_a_newer_one(store: Mlflow) -> None:
    """It was killed while its store could not be reached."""
    Tracker(SUBJECT, About({}, {**TAGS, "params_hash": "q"})).close("KILLED")
    time.sleep(0.01)
    run_stage("finetune", {"train_seconds": 5.0})
    assert Publisher(store.uri).publish(journal.finished()).errors == []
    assert Publisher(store.uri).publish(journal.unfinished()).errors == []
    (run,) = store.runs(CURRENT)
    assert run.data.metrics == {"train_seconds": 5.0}
    (stage,) = store.runs(f"{STAGES} and tags.superseded = 'false'")
    assert stage.info.status == "FINISHED"


def test_a_training_that_diverged_and_is_done_again_gets_a_run_of_its_own(store: Mlflow) -> None:
    with tracked(params={"a": 1}, file="1") as tracker:
        tracker.tag("event_1", "diverged")
        tracker.final({"recoveries": 1})
    with tracked(params={"a": 1}, file="2") as tracker:
        tracker.final({"loss": 1})
    store.sync()
    (run,) = store.runs(CURRENT)
    assert run.data.metrics == {"loss": 1.0}
    assert "event_1" not in run.data.tags


def test_trials_of_dvc_keep_to_themselves(store: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage("finetune", {"train_seconds": 3.0})
    monkeypatch.setenv("DVC_EXP_NAME", "wavy-ovum")
    Path("results").rename("kept")
    run_stage("finetune", {"train_seconds": 5.0}, {"training": {"lr": 0.2}})
    Path("kept").rename("results/kept")
    store.sync()
    assert {r.info.run_name for r in store.runs(CURRENT)} == {"eb_jdat/seed0", "eb_jdat/seed0 [wavy-ovum]"}


def test_failures_are_marked(store: Mlflow) -> None:
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), tracked(name=error.__name__):
            raise error
    assert not Path("results").exists()
    store.sync()
    assert {(r.data.tags["experiment"], r.info.status) for r in store.runs()} == {("KeyboardInterrupt", "KILLED"), ("ValueError", "FAILED")}
    assert [path.name[:9] for path in journal.unfinished()] == ["finetune-"]  # the one that can go on; the failed one was sent


def test_a_replaced_file_is_not_sent_as_what_it_was(store: Mlflow) -> None:
    with tracked("attack") as tracker:
        for name in ("same.txt", "other.txt"):
            Path(name).write_text("kept")
            tracker.artifact(Path(name))
    Path("other.txt").write_text("a later run's")
    store.sync()
    (run,) = store.runs(CURRENT)
    assert store.artifacts(run) == ["same.txt"]


def test_pictures_over_training(store: Mlflow) -> None:
    from ebjdat.stages.train import _png

    images = torch.arange(16 * 8 * 8, dtype=torch.uint8).reshape(16, 1, 8, 8)
    with tracked(file="f") as tracker:
        tracker.picture("replay_buffer", _png(images), 1)
        tracker.picture("replay_buffer", _png(images), 2)
    store.sync()
    (run,) = store.runs(STAGES)
    files = [path for path in store.artifacts(run, "images") if path.endswith(".png")]
    assert sorted(f.split("+step+")[1][0] for f in files) == ["1", "2"]
    from PIL import Image

    shown = np.asarray(Image.open(store.client.download_artifacts(run.info.run_id, files[0])))
    assert shown.shape == (2 * 10 * 4, 8 * 10 * 4)
    assert np.array_equal(shown[4:36:4, 44:76:4], images[1, 0].numpy())  # second of the first row, each pixel four wide


def test_more_values_than_one_call_takes(store: Mlflow) -> None:
    with tracked("attack", file="a") as tracker:
        tracker.metrics({f"m{i}": i for i in range(890)}, 1)
        tracker.final({f"f{i}": i for i in range(1200)})
    store.sync()
    (child,) = store.runs(STAGES)
    (parent,) = store.runs(CURRENT)
    assert len([name for name in child.data.metrics if not name.startswith("system/")]) == 890 + 1200
    assert len(parent.data.metrics) == 1200


def test_results_that_came_back_are_current_again(store: Mlflow) -> None:
    """As `dvc checkout` of an older commit does, and `ebjdat sync` after it."""
    run_stage("finetune", {"x": 1})
    first = Path("results/seed0/finetune.journal.jsonl").read_bytes()
    run_stage("finetune", {"x": 2}, {"training": {"lr": 0.2}})
    Path("results/first.journal.jsonl").write_bytes(first)
    store.sync()
    assert [run.data.metrics["x"] for run in store.runs(CURRENT)] == [2]
    Path("results/seed0/finetune.journal.jsonl").unlink()
    store.sync()
    (current,) = store.runs(CURRENT)
    assert (current.data.metrics["x"], current.info.run_name) == (1, "eb_jdat/seed0")
    (child,) = store.runs("tags.kind = 'result-stage' and tags.superseded = 'false'")
    assert child.data.tags["mlflow.parentRunId"] == current.info.run_id


def test_a_store_that_lost_everything_is_filled_again_by_who_knew_it(store: Mlflow, empty_store: bytes) -> None:
    """One failed pass, after which nothing that the sender remembers of the store is relied on."""
    sender = Publisher(store.uri)
    tracker = Tracker(SUBJECT, ABOUT)
    tracker.metrics({"loss": 2.0}, 1)
    assert sender.publish(journal.unfinished()).errors == []
    Path("empty.db").write_bytes(empty_store)
    with sqlite3.connect("empty.db") as empty, sqlite3.connect("mlflow.db") as filled:
        empty.backup(filled)  # also under those who have it open
    tracker.metrics({"loss": 1.0}, 2)
    assert len(sender.publish(journal.unfinished()).errors) == 1
    assert sender.publish(journal.unfinished()).errors == []
    tracker.close("KILLED")
    assert len(store.runs(CURRENT)) == 1
    (run,) = store.runs(STAGES)
    assert [value for _, value in store.curve(run)] == [2.0, 1.0]


def test_a_damaged_journal_is_named_and_the_others_are_sent(store: Mlflow) -> None:
    Path("results").mkdir()
    Path("results/bad.journal.jsonl").write_text("not JSON\n")
    run_stage("finetune", {"x": 1})
    outcome = Publisher(store.uri).publish(journal.finished())
    assert [error.split(":")[0] for error in outcome.errors] == ["results/bad.journal.jsonl"]
    assert [run.data.metrics["x"] for run in store.runs(CURRENT)] == [1]


def test_a_journal_that_the_store_refuses_is_named_and_the_others_are_sent(store: Mlflow) -> None:
    run_stage("finetune", {"x$": 1})  # MLflow takes no metric of this name
    run_stage("finetune", {"x": 1}, seed=1)
    (error,) = Publisher(store.uri).publish(journal.finished()).errors
    assert error.startswith("results/seed0/finetune.journal.jsonl: MlflowException: ")
    (run,) = store.runs(f"{CURRENT} and tags.seed = '1'")
    assert run.data.metrics == {"x": 1}


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


def content(store: Mlflow) -> list[Any]:
    """Everything in a store that a reader sees, without ids."""
    runs = store.runs()
    names = {run.info.run_id: run.info.run_name for run in runs}
    found = []
    for run in runs:
        tags = {k: names.get(v, v) for k, v in run.data.tags.items()}
        curves = [store.curve(run, name) for name in ("loss", "acc")]
        data = [given.dataset.digest for given in run.inputs.dataset_inputs]
        files = sorted(path.split("+timestamp")[0] for place in ("", "images") for path in store.artifacts(run, place))
        found.append((run.info.run_name, run.info.status, tags, run.data.params, curves, data, files))
    return sorted(found, key=str)


def store_with_a_loss(path: Path, empty: bytes, fatal: int, after: bool) -> tuple[Mlflow, list[str]]:
    """Publish, lose that call, publish again, by the same publisher or another. Returns the store and the calls of the first time."""
    path.parent.mkdir()
    path.write_bytes(empty)
    store, paths = Mlflow(path), list(journal.finished())
    first = Publisher(store.uri)
    first._store._client = lossy = Lossy(store.client, fatal, after)
    outcome, calls = first.publish(paths), [*lossy.calls]
    assert bool(outcome.errors) == (fatal > 0)
    assert (first if fatal % 4 < 2 else Publisher(store.uri)).publish(paths).errors == []
    return store, calls


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

    def sent(fatal: int, after: bool) -> tuple[list[Any], int]:
        store, calls = store_with_a_loss(tmp_path / f"{fatal}{after}/mlflow.db", empty_store, fatal, after)
        return content(store), len(calls)

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
    save_checkpoint(network, profile, digits, Path("c.safetensors"))
    with tracked() as tracker:
        tracker.model(Path("c.safetensors"))

    def sent(fatal: int) -> list[str]:
        store, calls = store_with_a_loss(tmp_path / f"{fatal}/mlflow.db", empty_store, fatal, after=False)
        experiment = store.client.get_experiment_by_name("digits").experiment_id
        assert len(store.client.search_logged_models([experiment])) == 1, f"call {fatal} of {calls}"
        return calls

    calls = sent(0)
    for fatal in range(calls.index("get_run") + 1, len(calls) + 1):
        sent(fatal)
