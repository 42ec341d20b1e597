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
from PIL import Image

from ebjdat.stages.train import _png
from ebjdat.tracking import journal
from ebjdat.tracking.publish import Outcome, Publisher

from .conftest import CURRENT, RESULTS, STAGES, TAGS, Mlflow, run_stage, tracked

LR1, LR2 = {"training": {"lr": 0.1}}, {"training": {"lr": 0.2}}
OLD = f"{RESULTS} and tags.superseded = 'true'"
FINETUNE = Path("results/eb_jdat/seed0/finetune.journal.jsonl")


def children(store: Mlflow, run: Any) -> dict[str, Any]:
    """A run's stages."""
    return {child.data.tags["stage"]: child for child in store.runs(f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")}


def test_a_run_per_experiment_and_seed_with_everything_that_a_reader_asks_for(store: Mlflow) -> None:
    run_stage("finetune", LR1, train_seconds=3.0)
    Path("grid.png").write_bytes(b"png")
    with tracked("attack", LR1) as tracker:
        tracker.final({"clean_acc": 0.9, "n_test": 100, "norm": "Linf", "ok": True})
        tracker.artifact(Path("grid.png"))
        tracker.tag("event_1", "epoch 3: diverged")
    run_stage("finetune", LR1, seed=1)
    store.sync()
    found = {r.info.run_name: r for r in store.runs(CURRENT)}
    assert set(found) == {"eb_jdat/seed0", "eb_jdat/seed1"}
    run = found["eb_jdat/seed0"]
    assert run.data.metrics == {"train_seconds": 3.0, "clean_acc": 0.9, "n_test": 100.0}
    assert run.data.params == {"training.lr": "0.1"}
    assert run.info.status == "FINISHED"
    expected = {**TAGS, "params_hash": json.dumps(LR1), "experiment": "eb_jdat", "seed": "0", "event_1": "epoch 3: diverged"}
    expected |= {"state_finetune": "FINISHED", "state_attack": "FINISHED"}
    assert {key: run.data.tags.get(key) for key in expected} == expected
    (inputs,) = run.inputs.dataset_inputs
    assert (inputs.dataset.name, inputs.dataset.digest) == ("digits", "d")
    assert store.artifacts(run) == ["grid.png"]
    stages = children(store, run)
    assert {c.info.run_name for c in stages.values()} == {"eb_jdat/seed0/finetune", "eb_jdat/seed0/attack"}
    assert all(child.data.params == {} for child in stages.values())  # the UI would write all of them over each picture
    assert store.curve(stages["finetune"]) == [(1, 1.5), (2, 0.5)]
    assert stages["finetune"].data.metrics["system/system_memory_usage_megabytes"] > 100


def test_nothing_is_sent_twice_and_a_deleted_store_is_filled_again(store: Mlflow, empty_store: bytes) -> None:
    run_stage()
    assert store.sync() == Outcome(journals=1)
    before = {r.info.run_id: r.data.tags for r in store.runs()}
    assert store.sync() == Outcome()
    assert {r.info.run_id: r.data.tags for r in store.runs()} == before
    assert len(before) == 2
    other = Mlflow(Path("elsewhere/mlflow.db").absolute())
    other.path.parent.mkdir()
    other.path.write_bytes(empty_store)
    other.sync()
    assert content(other) == content(store)


@pytest.mark.parametrize("deleted", ["eb_jdat/seed0", "eb_jdat/seed0/finetune"])
def test_a_deleted_run_is_filled_again(store: Mlflow, deleted: str) -> None:
    run_stage("finetune", train_seconds=3.0)
    run_stage("attack", clean_acc=0.9)
    store.sync()
    before = content(store)
    (run,) = (run for run in store.runs() if run.info.run_name == deleted)
    store.client.delete_run(run.info.run_id)
    store.sync()
    assert content(store) == before
    assert store.sync() == Outcome()


def test_a_rerun_updates_and_new_settings_supersede(store: Mlflow) -> None:
    run_stage("finetune", LR1, train_seconds=3.0)
    run_stage("attack", LR1, clean_acc=0.8)
    store.sync()
    run_stage("finetune", LR1, train_seconds=5.0)
    store.sync()
    first = store.run()
    assert first.data.metrics == {"train_seconds": 5.0, "clean_acc": 0.8}
    assert sorted(run.data.tags["superseded"] for run in store.runs(STAGES)) == ["false", "false", "true"]
    run_stage("finetune", LR2, train_seconds=6.0)
    store.sync()
    latest = store.run()
    assert latest.info.run_id != first.info.run_id
    assert latest.data.params == {"training.lr": "0.2"}
    assert latest.data.metrics == {"train_seconds": 6.0}
    assert store.run(OLD).info.run_name == "eb_jdat/seed0 (superseded)"
    # The report knows which results hold: here the attack's still do, and an earlier stage's figure.
    Path("energy.png").write_bytes(b"png")
    with tracked("report", name="report", kind="report") as tracker:
        hashes, files = {"params_hash": json.dumps(LR2), "data_hash": "d"}, [Path("energy.png"), Path("missing.png")]
        tracker.result("eb_jdat", 0, hashes, {"clean_acc": 0.8, "train_seconds": 6.0}, files, Path("missing.safetensors"))
    store.sync()
    latest = store.run()
    assert store.artifacts(latest) == ["energy.png"]
    assert latest.data.metrics == {"train_seconds": 6.0, "clean_acc": 0.8}
    assert set(children(store, latest)) == {"finetune", "attack"}
    assert latest.data.tags["state_attack"] == "FINISHED"


def test_other_data_make_another_run(store: Mlflow) -> None:
    """The settings are the same, but not the data set."""
    run_stage("finetune", train_seconds=3.0)
    run_stage("attack", clean_acc=0.8)
    store.sync()
    run_stage("finetune", data_hash="e", train_seconds=5.0)
    store.sync()
    new, old = store.run(), store.run(OLD)
    assert (new.data.tags["data_hash"], new.data.metrics) == ("e", {"train_seconds": 5.0})
    assert (old.data.tags["data_hash"], old.data.metrics) == ("d", {"train_seconds": 3.0, "clean_acc": 0.8})


def test_what_was_running_and_is_superseded_was_killed(store: Mlflow) -> None:
    """Its machine is gone, and its journal with it: nothing else will say how it ended."""
    gone = tracked(params=LR2)
    store.sync()
    assert set(store.names().values()) == {"RUNNING"}
    journal.unfinished()[0].unlink()
    gone.close("KILLED")
    run_stage()
    store.sync()
    new, old = {"eb_jdat/seed0", "eb_jdat/seed0/finetune"}, {"eb_jdat/seed0 (superseded)", "eb_jdat/seed0/finetune (superseded)"}
    assert store.names() == dict.fromkeys(new, "FINISHED") | dict.fromkeys(old, "KILLED")


@pytest.mark.parametrize("ended", ["FINISHED", "KILLED"])
def test_what_arrives_late_does_not_replace_what_is_newer(store: Mlflow, ended: str) -> None:
    """Results of another machine, or an attempt that was killed while its store could not be reached."""
    tracked(params=LR2, file="late").close(ended)
    kept = [path.rename(f"{path}.late") for path in (*journal.finished(), *journal.unfinished())]
    time.sleep(0.01)
    run_stage(train_seconds=5.0)
    store.sync()
    for path in kept:
        path.rename(path.with_suffix(""))
    assert Publisher(store.uri).publish(journal.unfinished() or journal.finished()).errors == []
    assert store.run().data.metrics == {"train_seconds": 5.0}
    assert store.run(f"{STAGES} and tags.superseded = 'false'").info.status == "FINISHED"
    assert store.run(OLD).info.status == ended


def test_a_training_that_diverged_and_is_done_again_gets_a_run_of_its_own(store: Mlflow) -> None:
    with tracked(file="1") as tracker:
        tracker.tag("event_1", "diverged")
        tracker.final({"recoveries": 1})
    run_stage(loss=1)
    store.sync()
    run = store.run()
    assert run.data.metrics == {"loss": 1.0}
    assert "event_1" not in run.data.tags


def test_trials_of_dvc_keep_to_themselves(store: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage()
    monkeypatch.setenv("DVC_EXP_NAME", "wavy-ovum")
    FINETUNE.rename("results/kept.journal.jsonl")
    run_stage(params=LR2)
    store.sync()
    assert {r.info.run_name for r in store.runs(CURRENT)} == {"eb_jdat/seed0", "eb_jdat/seed0 [wavy-ovum]"}


def test_failures_are_marked(store: Mlflow) -> None:
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), tracked(name=error.__name__):
            raise error
    assert not Path("results").exists()
    store.sync()
    assert {(r.data.tags["experiment"], r.info.status) for r in store.runs()} == {("KeyboardInterrupt", "KILLED"), ("ValueError", "FAILED")}
    assert [path.parts[-3] for path in journal.unfinished()] == ["KeyboardInterrupt"]  # it can go on; the failed one was sent


def test_a_replaced_file_is_not_sent_as_what_it_was(store: Mlflow) -> None:
    with tracked("attack") as tracker:
        for name in ("same.txt", "other.txt"):
            Path(name).write_text("kept")
            tracker.artifact(Path(name))
    Path("other.txt").write_text("a later run's")
    store.sync()
    assert store.artifacts(store.run()) == ["same.txt"]


def test_pictures_over_training(store: Mlflow) -> None:
    images = torch.arange(16 * 8 * 8, dtype=torch.uint8).reshape(16, 1, 8, 8)
    with tracked() as tracker:
        tracker.picture("replay_buffer", _png(images), 1)
        tracker.picture("replay_buffer", _png(images), 2)
    store.sync()
    run = store.run(STAGES)
    files = [path for path in store.artifacts(run, "images") if path.endswith(".png")]
    assert sorted(f.split("+step+")[1][0] for f in files) == ["1", "2"]
    shown = np.asarray(Image.open(store.client.download_artifacts(run.info.run_id, files[0])))
    assert shown.shape == (2 * 10 * 4, 8 * 10 * 4)
    assert np.array_equal(shown[4:36:4, 44:76:4], images[1, 0].numpy())  # second of the first row, each pixel four wide


def test_more_values_than_one_call_takes(store: Mlflow) -> None:
    with tracked("attack") as tracker:
        tracker.metrics({f"m{i}": i for i in range(890)}, 1)
        tracker.final({f"f{i}": i for i in range(1200)})
    store.sync()
    assert len([name for name in store.run(STAGES).data.metrics if not name.startswith("system/")]) == 890 + 1200
    assert len(store.run().data.metrics) == 1200


def test_results_that_came_back_are_current_again(store: Mlflow) -> None:
    """As `dvc checkout` of an older commit does, and `ebjdat sync` after it; and the newer ones, when they are back."""
    kept = {}
    for x, params in ((1, LR1), (2, LR2)):
        run_stage(params=params, x=x)
        kept[x] = FINETUNE.read_bytes()
        time.sleep(0.01)
    Path("results/first.journal.jsonl").write_bytes(kept[1])
    for x in (2, 1, 2):
        FINETUNE.write_bytes(kept[x])
        store.sync()
        current = store.run()
        assert (current.data.metrics["x"], current.info.run_name) == (x, "eb_jdat/seed0")
        child = store.run(f"{STAGES} and tags.superseded = 'false'")
        assert child.data.tags["mlflow.parentRunId"] == current.info.run_id
        assert store.sync() == Outcome()


def test_a_store_that_lost_everything_is_filled_again_by_who_knew_it(store: Mlflow, empty_store: bytes) -> None:
    """What the sender found in the store is not relied on in its next pass."""
    sender, tracker = Publisher(store.uri), tracked()
    tracker.metrics({"loss": 2.0}, 1)
    assert sender.publish(journal.unfinished()).errors == []
    Path("empty.db").write_bytes(empty_store)
    with sqlite3.connect("empty.db") as empty, sqlite3.connect("mlflow.db") as filled:
        empty.backup(filled)  # also under those who have it open
    tracker.metrics({"loss": 1.0}, 2)
    assert sender.publish(journal.unfinished()).errors == []
    tracker.close("KILLED")
    assert len(store.runs(CURRENT)) == 1
    assert store.curve(store.run(STAGES)) == [(1, 2.0), (2, 1.0)]


def test_journals_that_are_damaged_or_refused_are_named_and_the_others_are_sent(store: Mlflow) -> None:
    run_stage(x=1)
    Path("results/damaged.journal.jsonl").write_text("not JSON\n")
    with tracked(seed=1, file="refused") as tracker:
        tracker.final({"x$": 1})  # MLflow takes no metric of this name
    damaged, refused = Publisher(store.uri).publish(journal.finished()).errors
    assert damaged.startswith("results/damaged.journal.jsonl: cannot be read (line 1: ")
    assert refused.startswith("results/refused.journal.jsonl: MlflowException: ")
    assert store.run(f"{CURRENT} and tags.seed = '0'").data.metrics == {"x": 1}


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


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.torture), pytest.param(3, marks=pytest.mark.torture)])
def test_whichever_call_is_lost_everything_arrives_and_each_once(empty_store: bytes, tmp_path: Path, first: int) -> None:
    """Every third call of sending two attempts of a stage fails in turn, before or after it is done; then it is sent again.

    The others: `pytest -m torture tests/tracking/test_publish.py`.
    """
    Path("figure.txt").write_text("a figure")
    for params in (LR1, LR2):
        with tracked(params=params, file=str(params["training"]["lr"])) as tracker:
            tracker.metrics({"loss": 1.5}, 1)
            tracker.tag("event_1", "diverged")
            tracker.artifact(Path("figure.txt"))
            if params == LR1:
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
