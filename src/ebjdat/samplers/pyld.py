"""Proximal-YOPO Langevin dynamics (JEM++, Yang & Ji 2021, arXiv 2109.09032)."""

from __future__ import annotations

import torch
from torch import Tensor

from ebjdat.models.energy import Energy
from ebjdat.models.wrn import WideResNet
from ebjdat.pixels import INTERNAL
from ebjdat.settings import ChainSettings


def pyld(model: WideResNet, x: Tensor, energy: Energy, spec: ChainSettings, generator: torch.Generator) -> Tensor:
    """Run chains x (B, C, H, W) in [-1, 1] down the energy; returns images in the same range.

    Each of `spec.steps` outer steps runs the whole network once for the adjoint p = d(-E)/d(stem output); each of
    `spec.inner_steps` inner steps then moves x along d<stem(x), p>/dx, clamped to [-clamp, clamp], through the stem alone.
    The stem is one convolution, so that gradient is the same wherever x is: it is computed once per outer step, and the
    inner steps, which JEM++'s code clamps to [-1, 1] one by one, end where one step of their sum does.
    """
    x = x.detach()
    for _ in range(spec.steps):
        with torch.enable_grad():
            h = model.stem(x).detach().requires_grad_(True)
            (p,) = torch.autograd.grad(-energy(model.trunk(h)).sum(), h)
        gradient = model.stem_gradient(p).float()
        if spec.clamp is not None:
            gradient = gradient.clamp(-spec.clamp, spec.clamp)
        x = x + spec.inner_steps * spec.step_size * gradient
        if spec.noise:
            x = x + spec.noise * torch.randn(x.shape, generator=generator, device=x.device)
        x = x.clamp(*INTERNAL)
    return x.detach()
