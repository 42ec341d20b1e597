"""What a step samples before its loss: chains x- and adversarial neighbours. No gradients reach the parameters from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data import batches
from ebjdat.data.batches import Batch
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.terms import MethodState
from ebjdat.pixels import INTERNAL, internal_distance
from ebjdat.samplers.budgets import Budget, Scale
from ebjdat.samplers.buffer import Chains, ReplayBuffer
from ebjdat.samplers.chains import run_chain, starter
from ebjdat.samplers.pgd import projected_gradient, random_point
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import AdversarySettings, TrainingSettings

GAUSSIAN_START = 0.001  # standard deviation in [0, 1] pixels (TRADES's own code)
PLANNED_STEPS = 100  # steps whose chains are taken from the buffer at once


@dataclass(frozen=True)
class SamplingState:
    """What sampling needs besides the batch. For methods with chains: the buffer, and the chains of this batch.

    scale: of the adversary's budget by class, in this epoch; None: the same budget for all. log_counts: log of the images of each class
    of the training split, less that of the largest class (K,). own: what the method keeps. epoch: from 0. teacher: a frozen network in
    eval mode, internal range. made: what was sampled before in the same step, by name.
    """

    settings: TrainingSettings
    buffer: ReplayBuffer | None = None
    chains: Chains | None = None
    scale: Scale | None = None
    log_counts: Tensor | None = None
    own: MethodState | None = None
    epoch: int = 0
    teacher: nn.Module | None = None
    made: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_epoch(
        cls, settings: TrainingSettings, buffer: ReplayBuffer | None, pool: StartPool, epoch: int, teacher: nn.Module | None = None
    ) -> SamplingState:
        """What all steps of an epoch, from 0, have in common."""
        counts, spec = torch.tensor([len(members) for members in pool.members], dtype=torch.float64), settings.adversary.budget
        scale: Scale | None = registry.load(registry.BUDGETS, spec.name)(spec, counts, epoch, settings.epochs)
        device = pool.data.device
        logs = (counts / counts.max()).log().to(device, torch.float32)
        return cls(settings, buffer, scale=scale and scale.on(device), log_counts=logs, epoch=epoch, teacher=teacher)

    def budget(self, y: Tensor) -> Budget:
        """How far the adversary may move images with labels y (B,)."""
        usual = Budget.usual(self.settings.adversary)
        return usual if self.scale is None else self.scale.of(usual, y)


def sampling_states(
    common: SamplingState, pool: StartPool, purpose: tuple[int | str, ...], first: int, steps: int
) -> Iterator[SamplingState]:
    """What each step of an epoch samples from, from step `first` on; chains are planned some steps ahead.

    common: SamplingState.of_epoch. The same purpose and step give the same chains, wherever a training was interrupted.
    """
    plan, settings, buffer = None, common.settings, common.buffer
    for step in range(first, steps):
        if buffer is None:
            yield common
            continue
        block, within = divmod(step, PLANNED_STEPS)
        if plan is None or within == 0:
            noise, spec = batches.generator(pool.data.device, *purpose, block), settings.chain
            planned = min(PLANNED_STEPS, steps - block * PLANNED_STEPS)
            plan = buffer.plan(planned, settings.chains, spec.reinit, starter(spec, pool), noise)
        yield replace(common, chains=buffer.take(plan, within))


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
    return neighbours(model, batch.x, batch.y, state.settings.adversary, generator, state.budget(batch.y), state.teacher)


def taught(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """The teacher's logits of batch.x: (B, K)."""
    return _of_teacher(batch.x, state)


def taught_adversarial(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """The teacher's logits of the adversarial neighbours: (B, K)."""
    return _of_teacher(state.made["adversarial"], state)


def trust(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """IAD's reliability of its teacher, T_y(x~)^trust: (B,). 1 in the first epochs, `weights.alone` of them all."""
    weights = state.settings.weights
    if state.epoch < weights.alone * state.settings.epochs:
        return torch.ones(len(batch.y), device=batch.x.device)
    right = state.made["taught_adversarial"].log_softmax(1).gather(1, batch.y[:, None])[:, 0]
    return (weights.trust * right).exp()


def _of_teacher(x: Tensor, state: SamplingState) -> Tensor:
    assert state.teacher is not None
    with torch.no_grad():
        logits: Tensor = state.teacher(x)
    return logits


def uniform(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """A uniform point of each image's ball: (B, C, H, W) in [-1, 1]."""
    return random_point(batch.x, state.budget(batch.y).eps, state.settings.adversary.norm, INTERNAL, generator)


def corner(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Each image moved by the radius up or down in every pixel, at random: (B, C, H, W) in [-1, 1]."""
    sign = torch.randint(0, 2, batch.x.shape, generator=generator, device=batch.x.device) * 2 - 1
    return (batch.x + state.budget(batch.y).eps * sign).clamp(*INTERNAL)


def log_counts(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """log(n_c / n_max) of every class, n_c its images in the training split: the same row (B, K) for each image."""
    assert state.log_counts is not None
    return state.log_counts.expand(len(batch.y), -1)


def nuisance(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Displacements u ~ N(0, S), one of each image, S = mean d d' over differences d = x~ - x: (B, C, H, W), of [-1, 1] pixels.

    u = sum g_i d_i / sqrt(r) with standard normal g, so that no matrix of pixels is formed. r: the number of differences, those of the
    first images, at most half that of pixels; so directions are left for `nuisance_complement`.
    """
    return _mixed(_differences(batch.x, state.made["adversarial"]), batch.x, generator)


def nuisance_isotropic(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Displacements u ~ N(0, s^2 1) with the mean square length of `nuisance`."""
    u = torch.randn(batch.x.shape, generator=generator, device=batch.x.device)
    return u * (_trace(_differences(batch.x, state.made["adversarial"])) / u[0].numel()).sqrt()


def nuisance_complement(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Normal displacements that are orthogonal to all differences of `nuisance`, all such directions alike, of its mean square length."""
    d = _differences(batch.x, state.made["adversarial"])
    u = torch.randn(batch.x.shape, generator=generator, device=batch.x.device).flatten(1)
    with torch.autocast(u.device.type, enabled=False):
        q = torch.linalg.qr(d.T).Q  # (C H W, r): orthonormal, also where differences depend on each other
        u = u - (u @ q) @ q.T
    return (u * (_trace(d) / (u.shape[1] - len(d))).sqrt()).view_as(batch.x)


def nuisance_shuffled(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """As `nuisance`, from differences to the adversarial neighbour of the image before, scaled to its mean square length."""
    moved = state.made["adversarial"]
    d, other = _differences(batch.x, moved), _differences(batch.x, moved.roll(1, 0))
    return _mixed(other, batch.x, generator) * (_trace(d) / _trace(other).clamp_min(1e-30)).sqrt()


def _differences(x: Tensor, moved: Tensor) -> Tensor:
    """(r, C H W), r at most half of C H W."""
    return (moved - x).flatten(1)[: x[0].numel() // 2]


def _trace(d: Tensor) -> Tensor:
    """Of mean d d': the mean square length of rows (r, D)."""
    return d.square().sum(1).mean()


def _mixed(d: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """For each image of x, rows of d (r, D) with standard normal weights, over sqrt(r)."""
    g = torch.randn(len(x), len(d), generator=generator, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        return (g @ d / len(d) ** 0.5).view_as(x)


def neighbours(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    spec: AdversarySettings,
    generator: torch.Generator,
    budget: Budget | None = None,
    teacher: nn.Module | None = None,
) -> Tensor:
    """Projected-gradient neighbours of internal-range images: (B, C, H, W) in [-1, 1].

    budget: limits of each image; None: the settings' eps, step and steps for all, which are in [0, 1] pixels unless they say otherwise.
    teacher: for scores that read one.
    """
    budget = budget or Budget.usual(spec)
    if spec.start == "uniform":
        start = random_point(x, budget.start, spec.norm, INTERNAL, generator)
    elif spec.start == "gaussian":
        start = x + internal_distance(GAUSSIAN_START) * torch.randn(x.shape, generator=generator, device=x.device)
    else:
        start = x
    at_hand = {"teacher": teacher, "generator": generator}
    read = {name: at_hand[name] for name in registry.SCORES[spec.score].reads}
    with frozen_parameters(model, spec.mode):
        return projected_gradient(
            registry.load(registry.SCORES, spec.score)(model, x, y, **read),
            x,
            eps=budget.eps,
            step_size=budget.step,
            steps=budget.steps,
            norm=spec.norm,
            bounds=INTERNAL,
            start=start,
            into_ball=spec.project,
            own_steps=budget.own_steps,
        )
