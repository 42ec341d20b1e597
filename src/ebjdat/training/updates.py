"""Optimisers, and how one step uses them: update(model, optimizer, closures, settings, when) -> Terms.

closures: the loss on each equal slice of the batch, usually one. An update minimises their mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ebjdat.models.modes import frozen_statistics
from ebjdat.objectives.terms import Terms, mean
from ebjdat.settings import OptimizerSettings, UpdateSettings

Closure = Callable[[], Terms]


@dataclass(frozen=True)
class When:
    """A step's epoch, from 0, and its only source of randomness."""

    epoch: int
    noise: torch.Generator


def sgd(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)


def adam(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)


def gradients(optimizer: torch.optim.Optimizer, closures: Sequence[Closure]) -> Terms:
    """Leave the gradients of the slices' mean loss with the parameters; returns the terms' means, detached."""
    optimizer.zero_grad(set_to_none=True)
    parts = []
    for closure in closures:
        terms = closure()
        (terms.loss / len(closures)).backward()
        parts.append(replace(terms, loss=terms.loss.detach()))
    return mean(parts)


def with_gradients(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and their gradients."""
    pairs = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [p for p, _ in pairs], [gradient for _, gradient in pairs]


@contextlib.contextmanager
def perturbed(model: nn.Module, weights: Sequence[Tensor], offsets: Iterable[Tensor]) -> Iterator[None]:
    """While entered, weights + offsets; then the weights as they were, bit for bit.

    Batch norm's running statistics stay as they are, since they describe the weights themselves.
    """
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p, offset in zip(weights, offsets, strict=True):
            p.add_(offset)
    with frozen_statistics(model):
        yield
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(old)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, closures: Sequence[Closure], settings: UpdateSettings, when: When) -> Terms:
    """One evaluation of the loss, one step."""
    terms = gradients(optimizer, closures)
    optimizer.step()
    return terms


def sam(model: nn.Module, optimizer: torch.optim.Optimizer, closures: Sequence[Closure], settings: UpdateSettings, when: When) -> Terms:
    """A step along the gradient at w + e, e the worst perturbation of length rho to first order.

    SAM (Foret et al. 2021, arXiv 2010.01412): e = rho g / |g|. Adaptive (Kwon et al. 2021, arXiv 2102.11600):
    e = rho w^2 g / ||w| g|. Both evaluations are the same closures. Returns the terms at w.
    """
    terms = gradients(optimizer, closures)
    weights, grads = with_gradients(optimizer)
    with torch.no_grad():
        scaled = [p.abs() * g if settings.adaptive else g for p, g in zip(weights, grads, strict=True)]
        length = torch.stack([part.norm() for part in scaled]).norm().clamp_min(1e-12)
        offsets = [settings.rho / length * (p.abs() * part if settings.adaptive else part) for p, part in zip(weights, scaled, strict=True)]
    with perturbed(model, weights, offsets):
        gradients(optimizer, closures)
    optimizer.step()
    return terms


def awp(model: nn.Module, optimizer: torch.optim.Optimizer, closures: Sequence[Closure], settings: UpdateSettings, when: When) -> Terms:
    """A step along the gradient at w + v, v the worst perturbation of each layer by rho of its length, to first order.

    Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884, eq. 8, one step): v = rho |w| g / |g| for tensors with more
    than one dimension; biases and batch norm stay. The first `after` epochs have none. Weight decay is taken at w (the authors' code
    takes it at w + v). Returns the terms at w.
    """
    return _layerwise(model, optimizer, closures, settings, when, lambda g: g)


def awp_random(
    model: nn.Module, optimizer: torch.optim.Optimizer, closures: Sequence[Closure], settings: UpdateSettings, when: When
) -> Terms:
    """The control of `awp`: each layer is perturbed as far, in a random direction."""
    return _layerwise(model, optimizer, closures, settings, when, lambda g: torch.randn(g.shape, generator=when.noise, device=g.device))


def _layerwise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    closures: Sequence[Closure],
    settings: UpdateSettings,
    when: When,
    direction: Callable[[Tensor], Tensor],
) -> Terms:
    """A step along the gradient at w + rho |w| d / |d| in each layer; direction: a layer's gradient -> its d."""
    terms = gradients(optimizer, closures)
    if when.epoch >= settings.after:
        layers = [(p, direction(g)) for p, g in zip(*with_gradients(optimizer), strict=True) if p.ndim > 1]
        with torch.no_grad():
            offsets = [settings.rho * p.norm() / d.norm().clamp_min(1e-12) * d for p, d in layers]
        with perturbed(model, [p for p, _ in layers], offsets):
            gradients(optimizer, closures)
    optimizer.step()
    return terms
