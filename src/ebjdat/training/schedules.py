"""Learning-rate multipliers as functions (settings, step, steps per epoch, epochs) -> factor of the base rate."""

from __future__ import annotations

from ebjdat.settings import ScheduleSettings


def _warmup(settings: ScheduleSettings, step: int) -> float:
    return min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0


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
