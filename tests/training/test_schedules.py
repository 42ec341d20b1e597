"""Schedules against torch's and a triangle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebjdat.settings import ScheduleSettings
from ebjdat.training import schedules


def test_multistep_matches_torch() -> None:
    """Against torch's LinearLR and MultiStepLR chained by hand: 100 steps per epoch."""
    settings = ScheduleSettings(name="multistep", warmup=50, milestones=(2, 3), factor=0.2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 50, 1.0, 49)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [200, 300], 0.2)
    for step in range(400):
        assert schedules.multistep(settings, step, 100, 4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        warm.step()
        steps.step()


def test_onecycle_is_a_triangle() -> None:
    settings = ScheduleSettings(name="onecycle", peak=0.25)
    factors = [schedules.onecycle(settings, step, 10, 4) for step in range(40)]
    x = (np.arange(40) + 0.5) / 40
    assert np.allclose(factors, np.interp(x, [0, 0.25, 1], [0, 1, 0]))
    assert schedules.constant(ScheduleSettings(name="constant", warmup=4), 1, 10, 4) == 0.5


@pytest.mark.parametrize("peak", [0.025, 0.3, 1.0])
def test_cosine_onecycle_matches_torch(peak: float) -> None:
    """Against torch's OneCycleLR over 12 epochs of 10 steps, to rounding."""
    settings = ScheduleSettings(name="cosine_onecycle", peak=peak)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=120, pct_start=peak, anneal_strategy="cos")
    for step in range(120):
        assert schedules.cosine_onecycle(settings, step, 10, 12) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < 119:
            expected.step()
    assert schedules.cosine_onecycle(ScheduleSettings(peak=1.0), 0, 1, 1) == 1  # a training of one step


def test_cosine_matches_torch() -> None:
    """Against torch's CosineAnnealingLR, to rounding; a warm-up multiplies it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for step in range(40):
        rate = optimizer.param_groups[0]["lr"]
        assert schedules.cosine(ScheduleSettings(), step, 10, 4) == pytest.approx(rate, abs=1e-12)
        assert schedules.cosine(ScheduleSettings(warmup=8), step, 10, 4) == pytest.approx(rate * min(1, (step + 1) / 8), abs=1e-12)
        optimizer.step()
        expected.step()
