"""One projected-gradient routine for training adversaries and PGD-n evaluation, and the scores it ascends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.models.energy import joint_energy

Score = Callable[[Tensor], Tensor]


def cross_entropy_score(model: nn.Module, y: Tensor) -> Score:
    """Per-example cross-entropy of the true class (Madry et al. 2018)."""
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


def joint_energy_score(model: nn.Module, y: Tensor) -> Score:
    """Per-example E(x, y): ascending it is EB-JDAT's reverse SGLD, up the energy, conditioned on y."""
    return lambda x: joint_energy(model(x), y)


def unit_vectors(x: Tensor) -> Tensor:
    """Each image of (B, C, H, W) divided by its L2 length."""
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def project(x: Tensor, centre: Tensor, eps: float, norm: str, bounds: tuple[float, float]) -> Tensor:
    """Nearest point of the eps-ball around `centre`, then clamped into `bounds` (which keeps it in the ball)."""
    delta = x - centre
    if norm == "Linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta = delta * (eps / length).clamp_max(1.0).view(-1, 1, 1, 1)
    return (centre + delta).clamp(*bounds)


def random_point(x: Tensor, eps: float, norm: str, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Uniform in the eps-ball around x, then clamped into `bounds`."""
    if norm == "Linf":
        noise = (torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1) * eps
    else:
        direction = torch.randn(x.shape, generator=generator, device=x.device)
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) ** (1 / x[0].numel())
        noise = unit_vectors(direction) * radius * eps
    return project(x + noise, x, eps, norm, bounds)


def projected_gradient(
    score: Score,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str,
    bounds: tuple[float, float],
    generator: torch.Generator | None,
) -> Tensor:
    """Ascend `score` (images -> (B,)) from x inside its eps-ball and `bounds`.

    eps, step_size and bounds are in the range of x. generator: start at a random point of the ball; None: start at x.
    Steps are signs for Linf, unit vectors for L2. Returns images like x, without gradient.
    """
    x = x.detach()
    moved = x if generator is None else random_point(x, eps, norm, bounds, generator)
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(moved).sum(), moved)
        step = gradient.sign() if norm == "Linf" else unit_vectors(gradient)
        moved = project(moved.detach() + step_size * step, x, eps, norm, bounds)
    return moved.detach()
