"""What a step draws before its loss: chains x- and adversarial neighbours. No gradients reach the parameters from here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.data.batches import Batch
from ebjdat.models.modes import moving_images
from ebjdat.models.wrn import WideResNet
from ebjdat.params import AdversarySettings, TrainingSettings
from ebjdat.pixels import INTERNAL, internal_distance
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.pgd import projected_gradient
from ebjdat.samplers.starts import StartPool


@dataclass(frozen=True)
class DrawState:
    """What draws need beside the batch. The buffer is None for methods without chains."""

    settings: TrainingSettings
    pool: StartPool
    buffer: ReplayBuffer | None

    def start(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        x: Tensor = registry.load(registry.STARTS, self.settings.chain.start)(self.pool, labels, generator)
        return x


def negatives(model: WideResNet, batch: Batch, state: DrawState, generator: torch.Generator) -> Tensor:
    """Persistent chains, one per image of the batch, moved once and put back: (B, C, H, W) in [-1, 1]."""
    spec = state.settings.chain
    assert state.buffer is not None
    slots, x = state.buffer.draw(len(batch.y), spec.reinit, state.start, generator)
    with moving_images(model, spec.mode):
        x = registry.load(registry.SAMPLERS, spec.sampler)(model, x, spec, generator)
    state.buffer.put(slots, x)
    return x


def adversarial(model: WideResNet, batch: Batch, state: DrawState, generator: torch.Generator) -> Tensor:
    """Adversarial neighbours of batch.x by the settings' score: (B, C, H, W) in [-1, 1]."""
    return neighbours(model, batch.x, batch.y, state.settings.adversary, generator)


def neighbours(model: WideResNet, x: Tensor, y: Tensor, spec: AdversarySettings, generator: torch.Generator) -> Tensor:
    """Projected-gradient neighbours of internal-range images; the budget of `spec` is in [0, 1] pixels."""
    with moving_images(model, spec.mode):
        return projected_gradient(
            registry.load(registry.SCORES, spec.score)(model, y),
            x,
            eps=internal_distance(spec.eps),
            step_size=internal_distance(spec.step_size),
            steps=spec.steps,
            norm=spec.norm,
            bounds=INTERNAL,
            generator=generator if spec.random_start else None,
        )
