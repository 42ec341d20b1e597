"""Attacks made for energy-based classifiers: they know that the logits are an energy, too.

An attack has the arguments and the result of those in autoattack.py; it comes after an ensemble, on what that left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.data.batches import generator
from ebjdat.evaluation.autoattack import FastNetwork, surely_broken
from ebjdat.models.energy import marginal_energy
from ebjdat.pixels import UNIT
from ebjdat.samplers.pgd import projected_gradient, random_point
from ebjdat.settings import AdaptiveSettings, ProtocolSettings

HALVINGS = 5  # of the step size, from the radius to a sixteenth of it, each for a fifth of the steps


class _Climb:
    """The score that one start climbs; it keeps the first point at which the network is wrong, and spares what is broken the rest."""

    def __init__(self, network: FastNetwork, y: Tensor, weight: float) -> None:
        self.network, self.y, self.weight = network, y, weight
        self.found = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        self.points: Tensor | None = None

    def __call__(self, moved: Tensor) -> Tensor:
        logits = self.network(moved)
        self.look(moved.detach(), logits)
        return F.cross_entropy(logits, self.y, reduction="none") - self.weight * marginal_energy(logits)

    @torch.no_grad()
    def look(self, moved: Tensor, logits: Tensor) -> None:
        """Note what is broken at these points."""
        now = surely_broken(self.network.decided(moved, logits), self.y) & ~self.found
        points = moved if self.points is None else self.points
        self.points = torch.where(now.view(-1, 1, 1, 1), moved, points)
        self.found |= now


def energy_ce(network: FastNetwork, x: Tensor, y: Tensor, settings: AdaptiveSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """PGD on CE(x, y) - w E(x) from random starts, with a step size that is halved four times; every other start takes CE + w E.

    Up CE - w E: misclassified at a low energy, where an energy-based model suspects nothing; but for images of which the network
    is surer than 1 / (1 + w) it leads back to y. Up CE + w E: at w = 1 that is E(x, y), which does not saturate as CE does.
    What a constant added to all logits changes, neither sees. Returns the first point of each image at which the network is
    wrong, and the image itself where there was none.
    """
    adversarial, rows = x.clone(), torch.arange(len(x), device=x.device)
    for restart in range(settings.restarts):
        noise = generator(x.device, "energy_ce", seed, restart)
        start = random_point(x, protocol.radius, protocol.norm, UNIT, noise)[rows]
        climb = _Climb(network, y[rows], -settings.weight if restart % 2 else settings.weight)
        last = _climbed(climb, x[rows], start, settings.steps, protocol)
        with torch.no_grad():
            climb.look(last, network(last))
        if climb.points is not None:
            adversarial[rows[climb.found]] = climb.points[climb.found]
        rows = rows[~climb.found]
        if not len(rows):
            break
    return adversarial


def _climbed(climb: _Climb, x: Tensor, start: Tensor, steps: int, protocol: ProtocolSettings) -> Tensor:
    """Where a start ends after all its steps."""
    moved = start
    for part in range(HALVINGS):
        of_part = steps * (part + 1) // HALVINGS - steps * part // HALVINGS
        moved = projected_gradient(
            climb,
            x,
            eps=protocol.radius,
            step_size=protocol.radius / 2**part,
            steps=of_part,
            norm=protocol.norm,
            bounds=UNIT,
            start=moved,
        )
        if climb.found.all():
            break
    return moved
