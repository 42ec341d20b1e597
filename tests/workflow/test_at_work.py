"""The lock that says who is at work in a folder: seen by others, gone with its process however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT

HOLD = "import at_work, time; held = at_work.hold(); print('held' if held else 'taken', flush=True); time.sleep(60)"
ASK = "import at_work, sys; print(at_work.by_another(*sys.argv[1:]))"


def asked(folder: Path, *tool: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow/scripts")}
    return subprocess.run(
        [sys.executable, "-c", ASK, *tool], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(("caller", "name"), [({}, "snakemake"), ({"DVC_STAGE": "x"}, "dvc repro")])
def test_who_is_at_work_is_known_until_it_is_killed(caller: dict[str, str], name: str, tmp_path: Path) -> None:
    environment = {**{k: v for k, v in os.environ.items() if k != "DVC_STAGE"}, "PYTHONPATH": str(ROOT / "workflow/scripts"), **caller}
    assert asked(tmp_path) == ""
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert asked(tmp_path) == f"`{name}` (process {holder.pid}) is at work in this folder; wait for it, or stop it, and rerun"
        assert bool(asked(tmp_path, "dvc")) == (name == "dvc repro")
        second = subprocess.Popen([sys.executable, "-c", HOLD], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline() == "taken\n"
        second.kill()
        second.communicate()
        holder.send_signal(signal.SIGKILL)
    assert asked(tmp_path) == ""
