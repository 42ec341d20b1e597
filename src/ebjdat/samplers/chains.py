"""Running chains by the settings' sampler and energy, in training and generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.models.energy import joint_energy, marginal_energy
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.buffer import Start
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import ChainSettings


def starter(spec: ChainSettings, pool: StartPool) -> Start:
    """The settings' start of chains: (labels, generator) -> images in [-1, 1]."""
    start = registry.load(registry.STARTS, spec.start)
    return lambda labels, generator: start(pool, labels, generator)


def run_chain(model: WideResNet, x: Tensor, y: Tensor, spec: ChainSettings, generator: torch.Generator) -> Tensor:
    """Chains x (B, C, H, W) of classes y (B,) after `spec.steps` full gradients of E(x), or of E(x, y) if conditional."""
    energy = (lambda logits: joint_energy(logits, y)) if spec.conditional else marginal_energy
    moved: Tensor = registry.load(registry.SAMPLERS, spec.sampler)(model, x, energy, spec, generator)
    return moved


def strides(model: WideResNet, x: Tensor, y: Tensor, spec: ChainSettings, generator: torch.Generator) -> Iterator[Tensor]:
    """The same chains after each of their `spec.steps` full gradients; the last is the result of `run_chain`, bit for bit.

    A sampler carries nothing from one step to the next but x and the generator, so runs of one step add up to one run.
    """
    one = spec.model_copy(update={"steps": 1})
    for _ in range(spec.steps):
        x = run_chain(model, x, y, one, generator)
        yield x
