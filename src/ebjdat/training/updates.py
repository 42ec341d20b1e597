"""Optimisers, and how one step uses them: update(optimizer, closure) -> the loss's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ebjdat.params import OptimizerSettings


def sgd(parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)


def adam(parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)


def plain(optimizer: torch.optim.Optimizer, closure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """One evaluation of the loss, one step."""
    optimizer.zero_grad(set_to_none=True)
    terms = closure()
    terms["loss"].backward()
    optimizer.step()
    return terms
