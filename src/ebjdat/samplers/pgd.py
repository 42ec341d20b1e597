"""One projected-gradient routine for training adversaries and PGD-n evaluation, and the scores it ascends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.models.energy import joint_energy, marginal_energy

Score = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> (B,)
MakeScore = Callable[..., Score]  # (network, images, labels), and what its row reads: teacher, generator -> what to ascend
Distance = float | Tensor  # of every image alike, or of each: (B, 1, 1, 1)


def cross_entropy_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """Cross-entropy of the true class (Madry et al. 2018)."""
    return lambda moved: F.cross_entropy(model(moved), y, reduction="none")


def kl_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """KL(p(.|x) || p(.|moved)), TRADES's inner maximisation. Its gradient vanishes at x itself: start elsewhere."""
    with torch.no_grad():
        clean = model(x).log_softmax(1)
    return lambda moved: F.kl_div(model(moved).log_softmax(1), clean, reduction="none", log_target=True).sum(1)


def kl_teacher_score(model: nn.Module, x: Tensor, y: Tensor, teacher: nn.Module) -> Score:
    """KL(T(x) || p(.|moved)), T the teacher's probabilities: RSLAD's inner maximisation (Zi et al. 2021, arXiv 2108.07969)."""
    with torch.no_grad():
        target = teacher(x).log_softmax(1)
    return lambda moved: F.kl_div(model(moved).log_softmax(1), target, reduction="none", log_target=True).sum(1)


def kl_disagree_score(model: nn.Module, x: Tensor, y: Tensor, teacher: nn.Module) -> Score:
    """KL(T(moved) || p(.|moved)), where student and teacher disagree: AdaAD's (Huang et al. 2023); gradients flow through both."""

    def score(moved: Tensor) -> Tensor:
        return F.kl_div(model(moved).log_softmax(1), teacher(moved).log_softmax(1), reduction="none", log_target=True).sum(1)

    return score


def random_sign_score(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Score:
    """A linear function with random signs: as many steps as any other score, in a direction that knows nothing of the network."""
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device) * 2.0 - 1
    return lambda moved: (moved * signs).flatten(1).sum(1)


def joint_energy_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """E(moved, y): ascending it is EB-JDAT's reverse SGLD, up the energy, conditioned on y."""
    return lambda moved: joint_energy(model(moved), y)


def targeted_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """Minus the cross-entropy of the class after the true one, (y + 1) mod K: towards a class that does not depend on the network."""

    def score(moved: Tensor) -> Tensor:
        logits = model(moved)
        return -F.cross_entropy(logits, (y + 1) % logits.shape[1], reduction="none")

    return score


def marginal_energy_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """E(moved): up the energy alone, whatever the class."""
    return lambda moved: marginal_energy(model(moved))


def energy_ce_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """CE(moved, y) - E(moved): misclassified and at a low energy, where an energy model does not suspect it."""

    def score(moved: Tensor) -> Tensor:
        logits = model(moved)
        return F.cross_entropy(logits, y, reduction="none") - marginal_energy(logits)

    return score


def squared_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """|p(moved) - p(x)|^2, SCORE's (Pang et al. 2022, arXiv 2202.10103). Its gradient vanishes at x itself: start elsewhere."""
    with torch.no_grad():
        clean = model(x).softmax(1)
    return lambda moved: (model(moved).softmax(1) - clean).square().sum(1)


def released_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """-E(moved, y) + |f(x)/|f(x)| - f(moved)/|f(moved)||^2, as EB-JDAT's released code: down the energy, unlike its paper."""
    return _with_distance(model, x, lambda logits: -joint_energy(logits, y))


def released_ce_score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """CE(moved, y) / 2 and the same distance: the step that is commented out there, whose mean is over slices of two images."""
    return _with_distance(model, x, lambda logits: F.cross_entropy(logits, y, reduction="none") / 2)


def _with_distance(model: nn.Module, x: Tensor, of: Score) -> Score:
    """`of` the moved images' logits, plus their squared distance from the clean logits, each divided by its length."""
    with torch.no_grad():
        clean = F.normalize(model(x), dim=1)

    def score(moved: Tensor) -> Tensor:
        logits = model(moved)
        return of(logits) + (F.normalize(logits, dim=1) - clean).square().sum(1)

    return score


def unit_vectors(x: Tensor) -> Tensor:
    """Each image of (B, C, H, W) divided by its L2 length."""
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def project(x: Tensor, centre: Tensor, eps: Distance, norm: str, bounds: tuple[float, float]) -> Tensor:
    """Nearest point of the eps-ball around `centre`, then clamped into `bounds` (which keeps it in the ball)."""
    delta = x - centre
    if norm == "Linf":
        delta = delta.clamp(-eps, eps)  # type: ignore[arg-type] # two numbers, or two tensors
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = delta * (eps / length).clamp_max(1.0)
    return (centre + delta).clamp(*bounds)


def random_point(x: Tensor, eps: Distance, norm: str, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
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
    eps: Distance,
    step_size: Distance,
    steps: int,
    norm: str,
    bounds: tuple[float, float],
    start: Tensor,
    into_ball: bool = True,
    own_steps: Tensor | None = None,
) -> Tensor:
    """Ascend `score` (images -> (B,)) from `start` inside the eps-ball around x and `bounds`.

    eps, step_size and bounds are in the range of x. Steps are signs for Linf, unit vectors for L2. into_ball False: kept
    within `bounds` alone, as EB-JDAT's released code does. own_steps (B, 1, 1, 1): how many of the steps each image takes; None: all.
    Returns images like x, without gradient.
    """
    x, moved = x.detach(), start
    for i in range(steps):
        moved = moved.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(moved).sum(), moved)
        step = gradient.sign() if norm == "Linf" else unit_vectors(gradient)
        before = moved.detach()
        moved = before + step_size * step
        moved = project(moved, x, eps, norm, bounds) if into_ball else moved.clamp(*bounds)
        if own_steps is not None:
            moved = torch.where(i < own_steps, moved, before)
    return moved.detach()
