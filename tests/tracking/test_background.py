"""The process that publishes beside the stages, and what users are told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.tracking import background, journal
from ebjdat.tracking.publish import Publisher

from .conftest import STAGES, Mlflow, run_stage
from .server import points_of, stage, wait_until


@pytest.mark.slow
def test_four_processes_on_a_store_that_does_not_exist_lose_nothing(tmp_path: Path) -> None:
    """As under `snakemake --cores 4`, with the process that sends beside them: what is done while one stage still runs, too."""
    names = [f"e{i}" for i in range(4)]
    long = stage(names[0], tmp_path, points=1500, pause=0.1, EBJDAT_TRACKING="1")
    short = [stage(name, tmp_path, points=50, pause=0.01, EBJDAT_TRACKING="1") for name in names[1:]]
    assert [process.communicate()[1] for process in short] == [""] * 3
    wait_until(lambda: len(journal.unfinished()) == 1, "what is done is sent")
    (tmp_path / "enough").touch()
    out, said = long.communicate()
    assert said == ""
    wait_until(lambda: not journal.unfinished(), "everything is sent")
    store = Mlflow(tmp_path / "mlflow.db")
    assert sorted(store.names()) == sorted(f"{name}/seed0{part}" for name in names for part in ("", "/finetune"))
    assert all(run.data.metrics["clean_acc"] == 0.9 for run in store.runs())
    points = dict.fromkeys(names, 50) | {names[0]: int(out.split()[1])}
    assert all(store.curve(run) == points_of(points[run.data.tags["experiment"]]) for run in store.runs(STAGES))


@pytest.mark.parametrize(
    ("address", "why"),
    [("sqlite:///folder?key=SECRET", "is a folder; name a file"), (f"sqlite:///{'a' * 300}?key=SECRET", "File name too long")],
)
def test_a_stage_ends_well_and_says_that_the_store_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str, why: str
) -> None:
    """And starts no process that would wait for the store."""
    monkeypatch.setenv("EBJDAT_TRACKING", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    Path("folder").mkdir()
    run_stage()
    shown = capfd.readouterr().err
    assert re.search(rf"nothing could be sent to sqlite:///\w+ since .*{why}", shown)
    assert "SECRET" not in shown
    assert not background.LOG.exists()
    assert len(journal.unfinished()) == len(list(journal.finished())) == 1


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
    run_stage()
    done = subprocess.run([sys.executable, "-c", WITHOUT_MLFLOW], capture_output=True, text=True, check=False)
    told = "error: nothing can be sent from here: mlflow is not installed (`make install` does it). Every journal is kept\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)
    assert len(list(journal.finished())) == 1


def test_what_a_store_refuses_after_everything_was_sent_is_one_line(monkeypatch: pytest.MonkeyPatch, store: Mlflow) -> None:
    """A server that lets runs be read, not changed."""
    from mlflow.exceptions import MlflowException

    run_stage()

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("403 for someone:secret\nand more")

    monkeypatch.setattr(Publisher, "_publish", refuse)
    told = CliRunner().invoke(app, ["sync"])
    assert (told.exit_code, type(told.exception)) == (1, SystemExit)
    assert "MlflowException: 403 for" in told.output
    assert "They are kept" in told.output
