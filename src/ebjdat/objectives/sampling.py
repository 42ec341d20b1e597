"""What a step draws before its loss: chains x- and adversarial neighbours. No gradients reach the parameters from here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import Batch
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.pixels import INTERNAL, internal_distance
from ebjdat.samplers.buffer import Chains, ReplayBuffer
from ebjdat.samplers.chains import run_chain
from ebjdat.samplers.pgd import projected_gradient, random_point
from ebjdat.settings import AdversarySettings, TrainingSettings

GAUSSIAN_START = 0.001  # standard deviation in [0, 1] pixels (TRADES's own code)


@dataclass(frozen=True)
class SamplingState:
    """What draws need beside the batch: for methods with chains the buffer, and those of its chains that belong to the batch."""

    settings: TrainingSettings
    buffer: ReplayBuffer | None = None
    chains: Chains | None = None


def negatives(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Persistent chains, one per image of the batch, moved once and put back: (B, C, H, W) in [-1, 1]."""
    spec, chains = state.settings.chain, state.chains
    assert state.buffer is not None
    assert chains is not None
    with frozen_parameters(model, spec.mode, model.chains_update_statistics):
        x = run_chain(model, chains.x, chains.labels, spec, generator)
    state.buffer.put(chains.slots, x)
    return x


def adversarial(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Adversarial neighbours of batch.x by the settings' score: (B, C, H, W) in [-1, 1]."""
    return neighbours(model, batch.x, batch.y, state.settings.adversary, generator)


def neighbours(model: nn.Module, x: Tensor, y: Tensor, spec: AdversarySettings, generator: torch.Generator) -> Tensor:
    """Projected-gradient neighbours of internal-range images; the budget of `spec` is in [0, 1] pixels unless it says otherwise."""
    as_internal = internal_distance if spec.range == "unit" else float
    eps, step_size = as_internal(spec.eps), as_internal(spec.step_size)
    if spec.start == "uniform":
        start = random_point(x, eps, spec.norm, INTERNAL, generator)
    elif spec.start == "gaussian":
        start = x + internal_distance(GAUSSIAN_START) * torch.randn(x.shape, generator=generator, device=x.device)
    else:
        start = x
    with frozen_parameters(model, spec.mode):
        return projected_gradient(
            registry.load(registry.SCORES, spec.score)(model, x, y),
            x,
            eps=eps,
            step_size=step_size,
            steps=spec.steps,
            norm=spec.norm,
            bounds=INTERNAL,
            start=start,
            into_ball=spec.project,
        )
