"""Stochastic gradient Langevin dynamics on the images' energy (Welling & Teh 2011), as JEM and SADA-JEM use it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebjdat.models.energy import Energy
from ebjdat.pixels import INTERNAL
from ebjdat.settings import ChainSettings


def downhill(model: nn.Module, x: Tensor, energy: Energy) -> Tensor:
    """-dE/dx of images (B, C, H, W)."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(-energy(model(x)).sum(), x)
    return gradient


def sgld(model: nn.Module, x: Tensor, energy: Energy, spec: ChainSettings, generator: torch.Generator) -> Tensor:
    """x <- x - step_size dE/dx + noise N(0, I), `spec.steps` times (JEM, arXiv 1912.03263, eq. 2 with its own noise).

    x: (B, C, H, W), started in [-1, 1]. Nothing is clamped, as in JEM: chains may leave the range.
    """
    for _ in range(spec.steps):
        x = x.detach() + spec.step_size * downhill(model, x, energy)
        x = x + spec.noise * torch.randn(x.shape, generator=generator, device=x.device)
    return x.detach()


def clipped_sgld(model: nn.Module, x: Tensor, energy: Energy, spec: ChainSettings, generator: torch.Generator) -> Tensor:
    """SGLD with gradients clamped to [-clamp, clamp] and images to [-1, 1] after each step (SADA-JEM, arXiv 2209.07959).

    x: (B, C, H, W) in [-1, 1]. Returns images in the same range.
    """
    for _ in range(spec.steps):
        gradient = downhill(model, x, energy)
        if spec.clamp is not None:
            gradient = gradient.clamp(-spec.clamp, spec.clamp)
        x = x.detach() + spec.step_size * gradient
        if spec.noise:
            x = x + spec.noise * torch.randn(x.shape, generator=generator, device=x.device)
        x = x.clamp(*INTERNAL)
    return x.detach()
