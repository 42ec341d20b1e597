"""The functions for Python programs, each on real data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ebjdat
from ebjdat.data.prepared import Prepared
from ebjdat.errors import AttackError
from ebjdat.settings import ParamsError
from ebjdat.training.checkpoint import CheckpointError

from .conftest import ROOT, Linear

SMALL = [str(ROOT / "params/overrides/ci.yaml"), "training.epochs=1"]


@pytest.mark.slow
def test_evaluate_agrees_with_the_exact_robustness_of_a_linear_network() -> None:
    model, x = Linear(), 0.5 + 0.2 * (torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    y = model(x).argmax(1)
    radius = model.robust_radius(x, y).detach()
    eps = float(radius.sort().values[8:10].mean())
    overrides = [f"protocols.standard.eps={eps}", f"protocols.standard.pgd.step_size={eps / 4}"]
    result = ebjdat.evaluate(model.train(), x, y, n=12, overrides=overrides)
    assert model.training
    assert (result.clean.value, result.clean.n) == (1.0, 24)
    assert result.ensemble is not None
    assert (result.ensemble.robust.correct, result.ensemble.robust.n) == (int((radius[:12] > eps).sum()), 12)
    assert 15 <= result.pgd.correct <= 19  # cross-entropy does not aim at the nearest class
    assert result.pgd == ebjdat.evaluate(model, x.double(), y.int(), n=0, overrides=overrides).pgd


def test_evaluate_refuses_what_it_would_measure_wrongly() -> None:
    model, x, y = Linear(), torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    for images, labels, problem in (
        (x * 255, y, r"images reach from .* they must be in \[0, 1\]"),
        (x * torch.nan, y, "images reach from nan"),
        ((x * 255).byte(), y, "images are torch.uint8"),
        (x[0], y, "one integer label for each"),
        (x, y[:2], r"labels torch.int64 \(2,\)"),
        (x, y.float(), "labels torch.float32"),
        (x, y + 9, "the network has 10 classes"),
    ):
        with pytest.raises(AttackError, match=problem):
            ebjdat.evaluate(model, images, labels, n=0)
    with pytest.raises(ParamsError, match="there is no protocol 'standart'; did you mean 'standard'"):
        ebjdat.evaluate(model, x, y, "standart")


@pytest.mark.slow
def test_train_and_load_a_checkpoint(digits: Prepared, tmp_path: Path) -> None:
    network, header = ebjdat.train(ROOT / "params/digits.yaml", "pgd_at", tmp_path / "pgd_at.safetensors", overrides=SMALL)
    assert (header.method, header.seed, header.training.epochs) == ("pgd_at", 0, 1)
    again, other = ebjdat.load_checkpoint(str(tmp_path / "pgd_at.safetensors"))
    assert other == header
    images, labels = digits.split("test")
    x = torch.from_numpy(images).float() / 255
    with torch.no_grad():
        logits = network(x)
        assert torch.equal(again(x), logits)
    assert not network.training
    assert (logits.argmax(1).numpy() == labels).mean() > 0.5  # images in [0, 1] are what it takes: after one epoch, chance is 0.1
    with pytest.raises(CheckpointError, match="no averaged weights"):
        ebjdat.load_checkpoint(tmp_path / "pgd_at.safetensors", averaged=True)
    with pytest.raises(ParamsError, match="'pgd-at' is not in this profile; did you mean 'pgd_at'"):
        ebjdat.train(ROOT / "params/digits.yaml", "pgd-at", tmp_path / "x.safetensors")
    start = tmp_path / "pgd_at.clean.safetensors"
    made, untrained = start.read_bytes(), [*SMALL, "experiments.pgd_at.training.epochs=0"]
    for seed, same in ((0, True), (1, False)):  # kept: an interrupted fine-tuning continues only from the same file
        ebjdat.train(ROOT / "params/digits.yaml", "pgd_at", tmp_path / "pgd_at.safetensors", seed=seed, overrides=untrained)
        assert (start.read_bytes() == made) == same


@pytest.mark.slow
def test_train_a_student_and_the_teacher_that_it_needs(tmp_path: Path) -> None:
    """The teacher's checkpoint is what training it by itself gives; it is trained once."""
    profile, out = ROOT / "params/digits-methods.yaml", tmp_path / "rslad.safetensors"
    network, header = ebjdat.train(profile, "rslad", out, overrides=SMALL)
    teacher = tmp_path / "rslad.trades-seed0.safetensors"
    alone, _ = ebjdat.train(profile, "trades", tmp_path / "trades.safetensors", overrides=SMALL)
    taught, _ = ebjdat.load_checkpoint(teacher)
    assert all(torch.equal(value, taught.state_dict()[name]) for name, value in alone.state_dict().items())
    made_at = teacher.stat().st_mtime_ns
    again, _ = ebjdat.train(profile, "rslad", out, overrides=SMALL)
    assert teacher.stat().st_mtime_ns == made_at
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert header.training.teacher is not None


def test_import_loads_nothing() -> None:
    code = "import sys, ebjdat; ebjdat.__version__; dir(ebjdat); print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert {"evaluate", "load_checkpoint", "train"} <= set(dir(ebjdat))
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        ebjdat.evalute  # noqa: B018
