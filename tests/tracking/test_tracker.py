"""What a stage journals: attempts that are continued or begun anew, full disks, damage, the machine's load."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebjdat.settings import flat
from ebjdat.tracking import address as addresses
from ebjdat.tracking import journal
from ebjdat.tracking.publish import Outcome, Publisher
from ebjdat.tracking.system import sampling
from ebjdat.tracking.tracker import numbers

from .conftest import STAGES, Mlflow, tracked
from .server import points_of, stage


def journalled(path: Path) -> list[tuple[int, dict[str, float]]]:
    return [(event.step, event.metrics) for event in journal.read(path) if event.metrics is not None]


def test_a_killed_stage_continues_in_its_run_with_each_value_once(store: Mlflow, tmp_path: Path) -> None:
    killed = stage("eb_jdat", tmp_path, points=3, hold=60)
    assert killed.stdout.readline() == "ready\n"
    (path,) = journal.unfinished()
    assert journal.is_written(path)
    store.sync()
    assert set(store.names().values()) == {"RUNNING"}
    killed.kill()
    killed.communicate()
    with path.open("a") as file:
        file.write('{"time": 1, "metr')  # killed in the middle of a line
    store.sync()
    assert set(store.names().values()) == {"KILLED"}
    assert stage("eb_jdat", tmp_path, points=5).communicate()[1] == ""
    store.sync()
    run = store.run(STAGES)
    assert (run.info.run_name, run.info.status) == ("eb_jdat/seed0/finetune", "FINISHED")
    assert store.curve(run) == points_of(5)
    assert store.curve(run, "clean_acc") == [(0, 0.9)]
    assert stage("eb_jdat", tmp_path, points=2, data="e").communicate()[1] == ""
    store.sync()
    assert len(store.runs(STAGES)) == 2  # other data: an attempt of its own


def test_a_killed_stage_continues_only_with_the_same_settings_and_code() -> None:
    """The commit may be another one: it also changes with what a stage does not depend on."""
    code = Path("loss.py")
    code.write_text("first")

    def attempts(lr: float, commit: str = "abc") -> int:
        tracked(params={"lr": lr}, code=code, git_commit=commit).close("KILLED")
        return len(journal.unfinished())

    assert [attempts(0.1), attempts(0.1, "def"), attempts(0.2)] == [1, 1, 2]
    code.write_text("second")
    assert attempts(0.1) == 3


def full_disk(*arguments: object, **named: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_stops_tracking_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    e, f = Path("results/e.journal.jsonl"), Path("results/f.journal.jsonl")
    with pytest.MonkeyPatch.context() as patch, tracked(file="e") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        patch.setattr(journal.Writer, "write", full_disk)
        tracker.metrics({"loss": 1.0}, 2)
        tracker.artifact(Path("missing"))
    assert capsys.readouterr().err.count("WARNING: tracking stops for this stage") == 1
    assert journalled(e) == [(1, {"loss": 1.0})]  # an output of the stage: it is there, with what could be written
    assert journal.read(e)[-1].end == "FINISHED"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Writer, "__init__", full_disk)
        with tracked(file="f") as tracker:
            tracker.metrics({"loss": 1.0}, 1)
    assert f.read_text() == ""
    note = "results/f.journal.jsonl: empty: its stage could not write it (a full disk?), or it was damaged"
    assert Publisher("sqlite:///unused.db").publish([f]) == Outcome(notes=[note])


LIMITED = """
import resource, signal, sys
from pathlib import Path
from ebjdat.tracking.journal import Subject
from ebjdat.tracking.tracker import Tracker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Tracker(Subject("digits", "e", 0, "finetune"), {}, {}, Path("results/e.journal.jsonl")) as tracker:
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
    assert begin.begin
    assert [event.step for event in pictures] == [0, 1, 2]
    assert end.end == "FINISHED"


def test_a_training_that_is_begun_anew_has_a_journal_of_its_own(store: Mlflow) -> None:
    """Its state was damaged or made on other threads: the points of the killed attempt are not its own."""
    killed = tracked()
    killed.metrics({"loss": 1.0}, 1)
    killed.close("KILLED")
    with tracked() as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 3.0}, 2)
    store.sync()
    new, old = sorted(store.runs(STAGES), key=lambda run: run.data.tags["superseded"])
    assert (store.curve(new), store.curve(old)) == ([(1, 2.0), (2, 3.0)], [(1, 1.0)])
    assert (new.info.status, old.info.status, old.data.tags["superseded"]) == ("FINISHED", "FAILED", "true")
    assert not journal.unfinished()


def test_what_a_continued_stage_says_again_is_not_journalled_again() -> None:
    """Also of a training that diverged: NaN is the same when it is measured again."""
    points = [{"loss": 1.0, "acc": 0.1}, {"loss": math.nan, "acc": 0.1}, {"loss": math.inf, "acc": 0.1}, {"loss": 2.0}]
    for number in (3, 4):
        tracker = tracked()
        for step, point in enumerate(points[:number]):
            tracker.metrics(point, step)
            tracker.picture("samples", b"png", step)
        tracker.tag("event_1", "diverged")
        tracker.close("KILLED")
    (path,) = journal.unfinished()
    assert [step for step, _ in journalled(path)] == [0, 1, 2, 3]
    events = journal.read(path)
    assert [event.step for event in events if event.picture] == [0, 1, 2, 3]
    assert sum(event.tag is not None for event in events) == 1


def test_journals_of_one_store_are_not_sent_to_another_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("sqlite:///a.db", "sqlite:///b.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match="failed"), tracked():
            raise ValueError("failed")
        assert len(journal.unfinished(addresses.store_id())) == 1
    assert len(journal.unfinished()) == 2


def test_a_stage_continues_beside_a_damaged_journal_of_its_own() -> None:
    tracked().close("KILLED")
    (path,) = journal.unfinished()
    path.write_bytes(path.read_bytes() + b"junk\n")
    with tracked(file="f") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
    assert journalled(Path("results/f.journal.jsonl")) == [(1, {"loss": 2.0})]
    assert journal.unfinished() == [path]  # for whoever wants to look at it


def test_samples_of_the_machine_come_at_their_time_and_at_the_end() -> None:
    found: list[dict[str, float]] = []
    with sampling(found.append, seconds=0.1):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            sum(range(1000))
    assert len(found) >= 2
    assert all(0 < sample["system/system_memory_usage_percentage"] < 100 for sample in found)
    assert found[0]["system/process_cpu_utilization_percentage"] > 10


def test_flat_and_numbers() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": [1]}) == {"a.b": 1, "a.c.d": 2, "e": [1]}
    assert numbers({"a": 1, "b": True, "c": "x", "d": 0.5, "e": None}) == {"a": 1.0, "d": 0.5}
