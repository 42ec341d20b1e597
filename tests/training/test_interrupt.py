"""Signals: SIGKILL anywhere, and a stop between two steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ebjdat.data.prepared import Prepared
from ebjdat.objectives.terms import Terms
from ebjdat.settings import TrainingSettings
from ebjdat.training.state import TrainingState
from tests.chain import Chain
from tests.conftest import ROOT
from tests.training.conftest import run


def test_sigkill_anywhere_and_again_gives_the_same_weights(chain: Chain, tmp_path: Path) -> None:
    """The real command, killed while it trains, then left alone; against one that was never killed."""
    command = [
        *(sys.executable, "-m", "ebjdat.cli", "finetune", "--params", str(ROOT / "params/digits.yaml")),
        *("--override", str(ROOT / "params/overrides/ci.yaml"), "--override", "experiments.eb_jdat.training.epochs=2"),
        *("--override", "runtime.checkpoint_minutes=0.0001", "--experiment", "eb_jdat", "--seed", "0"),
        *("--data", str(chain.data_path), "--initial", str(chain.weights("scratch"))),
        *("--out", "out.safetensors", "--metrics", "out.json", "--curve", "out.csv"),
    ]
    environment = {**os.environ, "EBJDAT_TRACKING": "0", "OMP_NUM_THREADS": "1"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(command, cwd=tmp_path / "whole", env=environment, check=True, capture_output=True)

    for wait in (0.7, None):  # seconds after the first state of this try was seen
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed/state").rglob("*.pt")}
        process = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, stderr=subprocess.PIPE)
        while wait and process.poll() is None:
            now = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed/state").rglob("*.pt")}
            if now and now != before:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        _, errors = process.communicate()
        assert process.returncode == (-signal.SIGKILL if wait else 0), errors.decode()
        assert bool(list((tmp_path / "killed").glob("out*"))) == (wait is None)
    assert b"continues at epoch" in errors
    whole, killed = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert "buffer.images" in whole
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert not list((tmp_path / "killed/state").rglob("*.pt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_it_is_at(
    number: signal.Signals, digits: Prepared, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the second step: that step is finished and saved, and the next try starts at the third."""
    whole = run(digits, settings, tmp_path / "whole")
    add, calls = TrainingState.add, 0

    def add_and_signal(self: TrainingState, terms: Terms) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        add(self, terms)

    monkeypatch.setattr(TrainingState, "add", add_and_signal)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run(digits, settings, tmp_path / "cut")
    assert calls == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = run(digits, settings, tmp_path / "cut")
    assert calls == 4  # of the epoch's 4 steps, the last two
    assert all(torch.equal(whole.selected.weights[k], result.selected.weights[k]) for k in whole.selected.weights)
