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
