"""Learning-rate multipliers as functions (settings, step, steps per epoch, epochs) -> factor of the base rate."""

from __future__ import annotations

import math

from ebjdat.settings import ScheduleSettings


def _warmup(settings: ScheduleSettings, step: int) -> float:
    return min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0


START, END = 1 / 25, 1 / 25 / 1e4  # rates at the ends of cosine_onecycle, relative to the base rate


def constant(settings: ScheduleSettings, step: int, per_epoch: int, epochs: int) -> float:
    return _warmup(settings, step)


def multistep(settings: ScheduleSettings, step: int, per_epoch: int, epochs: int) -> float:
    """x factor at each milestone (epochs), after a linear warm-up."""
    passed = sum(step >= milestone * per_epoch for milestone in settings.milestones)
    return float(_warmup(settings, step) * settings.factor**passed)


def onecycle(settings: ScheduleSettings, step: int, per_epoch: int, epochs: int) -> float:
    """Linear from 0 up to the base rate at `peak` of the training, linear down to 0 at its end."""
    at = (step + 0.5) / (per_epoch * epochs)
    return at / settings.peak if at < settings.peak else (1 - at) / max(1 - settings.peak, 1e-9)


def cosine(settings: ScheduleSettings, step: int, per_epoch: int, epochs: int) -> float:
    """Half a cosine from the base rate down to 0 after the last step, under a linear warm-up."""
    return _warmup(settings, step) * _along_cosine(1.0, 0.0, step / (per_epoch * epochs))


def cosine_onecycle(settings: ScheduleSettings, step: int, per_epoch: int, epochs: int) -> float:
    """From 1/25 of the base rate up to it at `peak` of the training, down to 4e-6 of it at the last step, along half a cosine each."""
    last = per_epoch * epochs - 1
    highest = settings.peak * (last + 1) - 1
    if step < highest:
        return _along_cosine(START, 1.0, step / highest)
    return _along_cosine(1.0, END, (step - highest) / max(last - highest, 1e-9))


def _along_cosine(start: float, end: float, at: float) -> float:
    """From start (at 0) to end (at 1), flat at both."""
    return end + (start - end) * (1 + math.cos(math.pi * at)) / 2
