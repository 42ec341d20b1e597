"""What a stage journals: attempts that are continued or begun anew, full disks, damage."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebjdat.settings import flat
from ebjdat.tracking import address as addresses
from ebjdat.tracking import journal
from ebjdat.tracking.publish import Outcome, Publisher
from ebjdat.tracking.tracker import About, Tracker, numbers

from .conftest import ABOUT, STAGES, SUBJECT, TAGS, Mlflow, tracked

ENDLESS = """
import sys, time
from pathlib import Path
from ebjdat.tracking.tracker import About, Subject, track
with track(Subject("digits", "eb_jdat", 0, "finetune"), About({"a": 1}, %r), Path("results/f.journal.jsonl")) as tracker:
    for step in range(int(sys.argv[1])):
        tracker.metrics({"loss": 10.0 - step}, step)
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    tracker.final({"done": 1})
"""


def test_a_killed_stage_continues_in_its_run_with_each_point_once(store: Mlflow) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ENDLESS % TAGS, "3", "60"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout
    assert killed.stdout.readline() == "ready\n"
    (path,) = journal.unfinished()
    assert journal.is_written(path)
    store.sync()
    assert {r.info.status for r in store.runs()} == {"RUNNING"}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with path.open("a") as file:
        file.write('{"time": 1, "metr')  # killed in the middle of a line
    store.sync()
    assert {r.info.status for r in store.runs()} == {"KILLED"}
    subprocess.run([sys.executable, "-c", ENDLESS % TAGS, "5", "0"], check=True)
    store.sync()
    assert [r.info.run_name for r in store.runs(STAGES)] == ["eb_jdat/seed0/finetune"]
    (run,) = store.runs(STAGES)
    assert run.info.status == "FINISHED"
    assert store.curve(run) == [(s, 10.0 - s) for s in range(5)]
    stage_again = subprocess.run([sys.executable, "-c", ENDLESS % {**TAGS, "data_hash": "e"}, "2", "0"], check=False)
    assert stage_again.returncode == 0
    store.sync()
    assert len(store.runs(STAGES)) == 2  # other data: an attempt of its own


def test_a_killed_stage_continues_only_with_the_same_settings_and_code() -> None:
    """The commit may be another one: it also changes with what a stage does not depend on."""
    code = Path("loss.py")
    code.write_text("first")

    def attempts(lr: float, commit: str = "abc") -> list[int]:
        """Begin, and be killed again. Returns how often each attempt so far was continued."""
        about = About({"lr": lr}, {**TAGS, "git_commit": commit}, code=[code])
        Tracker(SUBJECT, about).close("KILLED")
        return sorted(sum(event.resumed for event in journal.read(path)) for path in journal.unfinished())

    assert attempts(0.1) == [0]
    assert attempts(0.1, "def") == [1]
    assert attempts(0.2) == [0, 1]
    code.write_text("second")
    assert attempts(0.1) == [0, 0, 1]


def full_disk(*arguments: object, **named: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_stops_tracking_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path("results/e.journal.jsonl")
    with pytest.MonkeyPatch.context() as patch, tracked(file="e") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        patch.setattr(journal.Writer, "write", full_disk)
        tracker.metrics({"loss": 1.0}, 2)
        tracker.final({"x": 1})
    assert capsys.readouterr().err.count("WARNING: tracking stops for this stage") == 1
    events = journal.read(copy)  # an output of the stage: it is there, with what could be written
    assert [event.step for event in events if event.metrics is not None] == [1]
    assert events[-1].end == "FINISHED"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Writer, "__init__", full_disk)
        with tracked(file="f") as tracker:
            tracker.metrics({"loss": 1.0}, 1)
    assert Path("results/f.journal.jsonl").read_text() == ""
    outcome = Publisher("sqlite:///unused.db").publish([Path("results/f.journal.jsonl")])
    assert outcome == Outcome(notes=["results/f.journal.jsonl: empty; its stage could write none when it ran, or it was damaged"])


LIMITED = """
import resource, signal, sys
from pathlib import Path
from ebjdat.tracking.tracker import About, Subject, track
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
    assert begin.begin
    assert [event.step for event in pictures] == [0, 1, 2]
    assert end.end == "FINISHED"


def test_a_training_that_is_begun_anew_has_a_journal_of_its_own(store: Mlflow) -> None:
    """Its state was damaged or made on other threads: the points of the killed attempt are not its own."""
    killed = Tracker(SUBJECT, ABOUT)
    killed.metrics({"loss": 1.0}, 1)
    killed.close("KILLED")
    with tracked(file="f") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 3.0}, 2)
    store.sync()
    new, old = sorted(store.runs(STAGES), key=lambda run: run.data.tags["superseded"])
    assert [value for _, value in store.curve(new)] == [2.0, 3.0]
    assert [value for _, value in store.curve(old)] == [1.0]
    assert (new.info.status, old.info.status, old.data.tags["superseded"]) == ("FINISHED", "KILLED", "true")
    assert not journal.unfinished()


def test_a_point_that_is_not_a_number_is_the_same_when_it_is_measured_again() -> None:
    """As a training that diverged has it: training that continues from there does not begin anew."""
    points = [{"loss": 1.0, "acc": 0.1}, {"loss": math.nan, "acc": 0.1}, {"loss": math.inf, "acc": 0.1}]
    killed = Tracker(SUBJECT, ABOUT)
    for step, point in enumerate(points):
        killed.metrics(point, step)
    killed.close("KILLED")
    again = Tracker(SUBJECT, ABOUT)
    for step, point in enumerate([*points, {"loss": 2.0}]):
        again.metrics(point, step)
    again.close("KILLED")
    (path,) = journal.unfinished()
    assert [event.step for event in journal.read(path) if event.metrics is not None] == [0, 1, 2, 3]


def test_journals_of_one_store_are_not_sent_to_another_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("sqlite:///a.db", "sqlite:///b.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match="failed"), tracked():
            raise ValueError("failed")
        assert len(journal.unfinished(addresses.store_id())) == 1
    assert len(journal.unfinished()) == 2


def test_a_stage_continues_beside_a_damaged_journal_of_its_own() -> None:
    Tracker(SUBJECT, ABOUT).close("KILLED")
    (path,) = journal.unfinished()
    path.write_bytes(path.read_bytes() + b"junk\n")
    with tracked(file="f") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
    assert [event.metrics for event in journal.read(Path("results/f.journal.jsonl")) if event.metrics] == [{"loss": 2.0}]
    assert journal.unfinished() == [path]  # for whoever wants to look at it


def test_flat_and_numbers() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": [1]}) == {"a.b": 1, "a.c.d": 2, "e": [1]}
    assert numbers({"a": 1, "b": True, "c": "x", "d": 0.5, "e": None}) == {"a": 1.0, "d": 0.5}
