"""What selects checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import TrainingSettings
from ebjdat.training import validation
from ebjdat.training.state import Job, Learner
from tests.training.conftest import FULL, METHODS, changed, spy


@pytest.fixture
def images(digits: Prepared) -> DeviceData:
    return DeviceData(digits, "validation", torch.device("cpu"))


def test_the_attack_is_the_same_whatever_the_training_does(
    images: DeviceData, network: WideResNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released form, N-FGSM: their own neighbours in training; validation is PGD-10 on cross-entropy, projected, in eval mode."""
    seen = spy(monkeypatch, validation, "neighbours", lambda model, x, y, spec, noise: spec)
    for settings in (FULL.training_settings("eb_jdat_released"), METHODS.training_settings("n_fgsm")):
        validation.scores(network, settings, images, robust=True)
        spec, own = seen.pop(), settings.adversary
        used = (spec.score, spec.steps, spec.step, spec.mode, spec.start, spec.start_ratio, spec.project, spec.range, spec.eps)
        assert used == ("ce", 10, own.step_size, "eval", "uniform", 1.0, True, "unit", own.eps)
    assert not seen


def test_averaged_weights_have_their_own_scores(
    images: DeviceData, pool: StartPool, network: WideResNet, settings: TrainingSettings
) -> None:
    job = Job("t", "eb_jdat", changed(settings, ema=0.9), 0, Path())
    learner = Learner.of(network, job, pool)
    assert learner.ema is not None
    with torch.no_grad():
        for weight in learner.ema.module.parameters():
            weight.zero_()
    row: dict[str, float] = {}
    validation.validate(learner, job, images, row)
    assert row["ema_validation_energy"] == pytest.approx(-np.log(10), abs=1e-5)
    assert row["validation_energy"] != pytest.approx(-np.log(10), abs=1e-3)


def test_it_never_sees_the_test_split(digits: Prepared, images: DeviceData, settings: TrainingSettings, network: WideResNet) -> None:
    """Against a count by hand on the validation images."""
    pixels, labels = digits.split("validation")
    with torch.no_grad():
        correct = (network.eval()(torch.from_numpy(pixels).float() / 127.5 - 1).argmax(1).numpy() == labels).mean()
    row: dict[str, float] = {}
    learner = Learner(network, torch.optim.SGD(network.parameters()), None, None)
    score = validation.validate(learner, Job("t", "eb_jdat", settings, 0, Path()), images, row)
    assert row["validation_clean_acc"] == pytest.approx(correct)
    assert row["validation_robust_acc"] <= row["validation_clean_acc"]
    assert score == pytest.approx((row["validation_clean_acc"] + row["validation_robust_acc"]) / 2)


def test_the_attack_has_the_usual_budget_whatever_the_training_s(images: DeviceData, network: WideResNet) -> None:
    """Bit for bit, in an epoch whose own neighbours would not move."""
    plain = METHODS.training_settings("pgd_at")
    found = [
        validation.scores(network, changed(plain, adversary={"budget": {"name": name}}), images, robust=True)
        for name in ("uniform", "robust_lt", "ramp")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["robust_acc"] < found[0]["clean_acc"]
