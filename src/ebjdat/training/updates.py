"""Optimisers, and how one step uses them: update(model, optimizer, closures, settings) -> the loss's terms.

closures: the loss on each equal slice of the batch; usually there is one. What is minimised is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ebjdat.models.modes import frozen_statistics
from ebjdat.settings import OptimizerSettings, UpdateSettings

Closure = Callable[[], dict[str, Tensor]]


def sgd(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)


def adam(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)


def gradients(optimizer: torch.optim.Optimizer, closures: Sequence[Closure]) -> dict[str, Tensor]:
    """Leave the gradients of the slices' mean loss with the parameters; returns the terms' means, detached."""
    optimizer.zero_grad(set_to_none=True)
    total: dict[str, Tensor] = {}
    for closure in closures:
        terms = closure()
        (terms["loss"] / len(closures)).backward()
        for name, value in terms.items():
            part = value.detach() / len(closures)
            total[name] = total[name] + part if name in total else part
    return total


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, closures: Sequence[Closure], settings: UpdateSettings) -> dict[str, Tensor]:
    """One evaluation of the loss, one step."""
    terms = gradients(optimizer, closures)
    optimizer.step()
    return terms


def sam(model: nn.Module, optimizer: torch.optim.Optimizer, closures: Sequence[Closure], settings: UpdateSettings) -> dict[str, Tensor]:
    """A step along the gradient at w + e, e the worst perturbation of length rho to first order.

    SAM (Foret et al. 2021, arXiv 2010.01412): e = rho g / |g|. Adaptive (Kwon et al. 2021, arXiv 2102.11600):
    e = rho w^2 g / ||w| g|. Both evaluations are the same closures; the second leaves batch-norm's running statistics alone,
    since they are to describe w. Returns the terms at w.
    """
    terms = gradients(optimizer, closures)
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    with torch.no_grad():
        scaled = [p.abs() * p.grad if settings.adaptive else p.grad for p in weights]
        length = torch.stack([part.norm() for part in scaled]).norm().clamp_min(1e-12)
        before = [p.clone() for p in weights]
        for p, part in zip(weights, scaled, strict=True):
            p.add_(settings.rho / length * (p.abs() * part if settings.adaptive else part))
    with frozen_statistics(model):
        gradients(optimizer, closures)
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(old)
    optimizer.step()
    return terms
