"""How much each example counts in a loss: functions (losses (B,), logits (B, K), settings) -> weights (B,), without gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebjdat.models.energy import marginal_energy
from ebjdat.settings import ExampleWeights

HALVINGS = 60  # of the bracket of log(1/l) below: to the last bit of a double
BRACKET = (-40.0, 40.0)


def uniform(losses: Tensor, logits: Tensor, settings: ExampleWeights) -> Tensor:
    """1 for each."""
    return torch.ones_like(losses)


def term(losses: Tensor, logits: Tensor, settings: ExampleWeights) -> Tensor:
    """B softmax(tilt loss): the gradient is that of log mean exp(tilt loss) / tilt (TERM, Li et al. 2021, arXiv 2007.01162)."""
    return len(losses) * (settings.tilt * losses).softmax(0)


def kl_dro(losses: Tensor, logits: Tensor, settings: ExampleWeights) -> Tensor:
    """B w, where w maximises sum w loss among distributions over the batch with KL(w || uniform) <= radius.

    w = softmax(loss / l), at the l whose divergence is the radius: the minimum over l of l radius + l log mean exp(loss / l) (Hu &
    Hong 2013). Beyond the largest divergence, log of B over the number of greatest losses, these share everything.
    """
    centred = (losses - losses.max()).double()
    spread = centred.abs().max().clamp_min(1e-300)
    low, high = (torch.full((), value, dtype=torch.float64, device=losses.device) for value in BRACKET)
    for _ in range(HALVINGS):  # no value is read, so the device is not waited for
        middle = (low + high) / 2
        near = divergence((centred * (middle.exp() / spread)).softmax(0)) < settings.radius
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    return len(losses) * (centred * (low.exp() / spread)).softmax(0).to(losses.dtype)


def divergence(weights: Tensor) -> Tensor:
    """KL(weights || uniform) in nats, of a distribution (B,)."""
    return torch.xlogy(weights, weights).sum() + math.log(len(weights))


def weat(losses: Tensor, logits: Tensor, settings: ExampleWeights) -> Tensor:
    """1 / log(1 + exp(|E(x)|)), not normalised (WEAT, Mirza et al. 2024, arXiv 2407.06315)."""
    return 1 / torch.nn.functional.softplus(marginal_energy(logits).abs())


def controlled(weights: Tensor, control: str) -> Tensor:
    """The same weights (B, ...) given to the wrong examples ("shuffled": each to the next), or their mean to all ("mean_matched").

    A batch is in random order, so the next example is a random one, and the same one in every pass of a step.
    """
    if control == "shuffled":
        return weights.roll(1, 0)
    return weights.mean(0, keepdim=True).expand_as(weights) if control == "mean_matched" else weights
