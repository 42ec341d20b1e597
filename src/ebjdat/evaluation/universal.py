"""Universal perturbation: one change of the pixels that is added to every image (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401).

Found on held-out images by projected sign ascent, as in Shafahi et al. 2020 (arXiv 1811.11304), and measured on others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import generator
from ebjdat.evaluation.robust import predictions
from ebjdat.intervals import Proportion
from ebjdat.pixels import UNIT

STEP = 0.1  # of the radius


def perturbation(network: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int, batch_size: int, seed: int) -> Tensor:
    """delta (1, C, H, W), each pixel within the radius, that raises the mean cross-entropy of images x (N, C, H, W) in [0, 1].

    A sign step per batch, from 0; batches are drawn in an order of their own in each pass over the images.
    """
    order, delta = generator(torch.device("cpu"), "universal", seed), torch.zeros_like(x[:1])
    batches: list[Tensor] = []
    for _ in range(steps):
        batches = batches or list(torch.randperm(len(x), generator=order).to(x.device).split(batch_size))
        rows = batches.pop()
        delta.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(network(added(x[rows], delta)), y[rows])
            (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + STEP * radius * gradient.sign()).clamp(-radius, radius)
    return delta.detach()


def random_signs(x: Tensor, radius: float, seed: int) -> Tensor:
    """The control: as large at every pixel, with signs that know nothing of the network."""
    noise = torch.rand(x[:1].shape, generator=generator(x.device, "universal control", seed), device=x.device)
    return torch.where(noise < 0.5, -radius, radius)


def added(x: Tensor, delta: Tensor) -> Tensor:
    """Images with the perturbation, brought back into [0, 1]."""
    return (x + delta).clamp(*UNIT)


def measure(
    network: nn.Module, held_out: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], radius: float, steps: int, batch_size: int, seed: int
) -> dict[str, dict[str, Any]]:
    """attack -> statistic -> value, for names.flat_results: accuracy on test images under the perturbation, and under the control.

    network: frozen, in eval mode. held_out, test: images and labels.
    """
    x, y = test
    deltas = {
        "universal": perturbation(network, *held_out, radius, steps, batch_size, seed),
        "universal_random": random_signs(x, radius, seed),
    }
    results: dict[str, dict[str, Any]] = {"": {"n_universal": len(held_out[0])}}
    for name, delta in deltas.items():
        right = Proportion(int((predictions(network, added(x, delta), batch_size) == y).sum()), len(y))
        low, high = right.interval
        results[name] = {"correct": right.correct, "acc": right.value, "low": low, "high": high}
    return results
