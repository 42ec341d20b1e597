"""How far the training's adversary may go: budgets of each image, and functions that make them from its class and the epoch.

A budget function takes (settings, images per class (K,) float64, epoch from 0, epochs) and returns a Scale, or None for 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebjdat.pixels import internal_distance
from ebjdat.samplers.pgd import Distance
from ebjdat.settings import AdversarySettings, BudgetSettings


@dataclass(frozen=True)
class Budget:
    """Limits of an attack on a batch, in the internal range: of all images alike, or of each (B, 1, 1, 1).

    eps: radius of the ball. step: size of a step. start: radius of the ball in which a uniform start is drawn. steps: iterations;
    own_steps (B, 1, 1, 1): how many of these each image takes, None for all.
    """

    eps: Distance
    step: Distance
    start: Distance
    steps: int
    own_steps: Tensor | None = None

    @classmethod
    def usual(cls, spec: AdversarySettings) -> Budget:
        """That of the settings' eps, step and steps, the same for every image."""
        as_internal = internal_distance if spec.range == "unit" else float
        eps = as_internal(spec.eps)
        return cls(eps, as_internal(spec.step), spec.start_ratio * eps, spec.steps)


@dataclass(frozen=True)
class Scale:
    """Factors of the usual budget: by_class (K,) of eps and step, start of the radius of the start."""

    by_class: Tensor
    start: float = 1.0

    def on(self, device: torch.device) -> Scale:
        """In single precision on a device."""
        return Scale(self.by_class.to(device, torch.float32), self.start)

    def of(self, usual: Budget, y: Tensor) -> Budget:
        """The budget of images with labels y (B,)."""
        factor = self.by_class[y].view(-1, 1, 1, 1)
        return Budget(usual.eps * factor, usual.step * factor, usual.start * self.start, usual.steps, usual.own_steps)


def uniform(settings: BudgetSettings, counts: Tensor, epoch: int, epochs: int) -> None:
    """eps and step, for every image in every epoch."""


def ramp(settings: BudgetSettings, counts: Tensor, epoch: int, epochs: int) -> Scale:
    """eps, step and start grow from 0 in the first epoch, linearly over `warmup` of the epochs, for every image alike."""
    reached = _reached(settings, epoch, epochs)
    return Scale(torch.full_like(counts, reached), reached)


def robust_lt(settings: BudgetSettings, counts: Tensor, epoch: int, epochs: int) -> Scale:
    """eps and step by the rarity of the image's class, growing from 0 over `warmup` of the epochs (RobustLT, arXiv 2605.13395).

    Starts are uniform in the ball of the settings' eps, into whose class's ball the first step projects them, as in its code.
    """
    return Scale(_reached(settings, epoch, epochs) * by_rarity(counts, settings.by_class))


def robust_lt_permuted(settings: BudgetSettings, counts: Tensor, epoch: int, epochs: int) -> Scale:
    """The control of `robust_lt`: the same budgets, each given to another class, half of the classes further by size.

    The tail gets those of the head, so images have a larger budget on average.
    """
    by_size = counts.argsort(descending=True, stable=True)
    factors = by_rarity(counts, settings.by_class)
    permuted = torch.empty_like(factors)
    permuted[by_size] = factors[by_size.roll(-(len(counts) // 2))]
    return Scale(_reached(settings, epoch, epochs) * permuted)


def by_rarity(counts: Tensor, share: float) -> Tensor:
    """Factors (K,) of the radius by class, from images per class (K,): 1 - a + a s_c / sum_c (n_c / N) s_c, a the share.

    s_c = sqrt(log(n_max / n_c)). Their mean over images is 1; where all classes are as large, so is each.
    """
    rarity = (counts.max() / counts).log().sqrt()
    mean = (counts / counts.sum()) @ rarity
    return 1 - share + share * rarity / mean if mean > 0 else torch.ones_like(counts)


def _reached(settings: BudgetSettings, epoch: int, epochs: int) -> float:
    """Share of the budget in an epoch, from 0 in the first: min(epoch / (warmup epochs), 1)."""
    last = settings.warmup * epochs
    return min(epoch / last, 1.0) if last else 1.0
