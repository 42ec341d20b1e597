"""Averaged weights: an exponential moving average of those that are trained, with a warm-up if asked for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebjdat.settings import TrainingSettings

Tensors = tuple[Tensor, ...] | list[Tensor]


def averaged(model: nn.Module, settings: TrainingSettings, steps: int) -> AveragedModel | None:
    """A copy of the network that averages weights and buffers, or None if the settings have no `ema`. steps: of the whole training.

    The number of steps that it has seen, which the decay depends on, is part of its state.
    """
    if settings.ema is None:
        return None

    def average(mean: Tensors, current: Tensors, seen: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay(settings, int(seen), steps))(mean, current, seen)

    constant = get_ema_multi_avg_fn(settings.ema)
    return AveragedModel(model, multi_avg_fn=constant if settings.ema_warmup is None else average, use_buffers=True)


def decay(settings: TrainingSettings, step: int, steps: int) -> float:
    """Share of the mean that step `step` of `steps` (from 0) keeps. Without a warm-up it is constant.

    With one, it is 0 in its share of the steps, so that weights are copied; d steps later min(ema, (1 + d) / (10 + d)) (arXiv 2302.04638).
    """
    assert settings.ema is not None
    if settings.ema_warmup is None:
        return settings.ema
    since = step - int(settings.ema_warmup * steps)
    return 0.0 if since < 0 else min(settings.ema, (1 + since) / (10 + since))
