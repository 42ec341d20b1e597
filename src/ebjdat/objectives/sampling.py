"""What a step samples before its loss: chains x- and adversarial neighbours. No gradients reach the parameters from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data import batches
from ebjdat.data.batches import Batch
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.terms import MethodState
from ebjdat.pixels import INTERNAL, internal_distance
from ebjdat.samplers.buffer import Chains, ReplayBuffer
from ebjdat.samplers.chains import run_chain, starter
from ebjdat.samplers.pgd import projected_gradient, random_point
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import AdversarySettings, TrainingSettings

GAUSSIAN_START = 0.001  # standard deviation in [0, 1] pixels (TRADES's own code)
PLANNED_STEPS = 100  # steps whose chains are taken from the buffer at once


@dataclass(frozen=True)
class SamplingState:
    """What sampling needs besides the batch. For methods with chains: the buffer, and the chains of this batch. own: a method's state."""

    settings: TrainingSettings
    buffer: ReplayBuffer | None = None
    chains: Chains | None = None
    own: MethodState | None = None


def sampling_states(
    settings: TrainingSettings, buffer: ReplayBuffer | None, pool: StartPool, purpose: tuple[int | str, ...], first: int, steps: int
) -> Iterator[SamplingState]:
    """What each step of an epoch samples from, from step `first` on; chains are planned some steps ahead.

    The same purpose and step give the same chains, wherever a training was interrupted.
    """
    plan = None
    for step in range(first, steps):
        if buffer is None:
            yield SamplingState(settings)
            continue
        block, within = divmod(step, PLANNED_STEPS)
        if plan is None or within == 0:
            noise, spec = batches.generator(pool.data.device, *purpose, block), settings.chain
            planned = min(PLANNED_STEPS, steps - block * PLANNED_STEPS)
            plan = buffer.plan(planned, settings.chains, spec.reinit, starter(spec, pool), noise)
        yield SamplingState(settings, buffer, buffer.take(plan, within))


def negatives(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Persistent chains, one per image of the batch, run once and put back: (B, C, H, W) in [-1, 1]."""
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


def uniform(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """A uniform point of each image's ball: (B, C, H, W) in [-1, 1]."""
    spec = state.settings.adversary
    return random_point(batch.x, internal_radius(spec), spec.norm, INTERNAL, generator)


def corner(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Each image moved by the radius up or down in every pixel, at random: (B, C, H, W) in [-1, 1]."""
    sign = torch.randint(0, 2, batch.x.shape, generator=generator, device=batch.x.device) * 2 - 1
    return (batch.x + internal_radius(state.settings.adversary) * sign).clamp(*INTERNAL)


def internal_radius(spec: AdversarySettings) -> float:
    """eps in the internal range."""
    return internal_distance(spec.eps) if spec.range == "unit" else spec.eps


def neighbours(model: nn.Module, x: Tensor, y: Tensor, spec: AdversarySettings, generator: torch.Generator) -> Tensor:
    """Projected-gradient neighbours of internal-range images; the budget of `spec` is in [0, 1] pixels unless it says otherwise."""
    as_internal = internal_distance if spec.range == "unit" else float
    eps, step_size = as_internal(spec.eps), as_internal(spec.step)
    if spec.start == "uniform":
        start = random_point(x, spec.start_ratio * eps, spec.norm, INTERNAL, generator)
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
