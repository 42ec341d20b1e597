"""Proximal-YOPO Langevin dynamics (JEM++, Yang & Ji 2021, arXiv 2109.09032)."""

from __future__ import annotations

import torch
from torch import Tensor

from ebjdat.models.energy import marginal_energy
from ebjdat.models.wrn import WideResNet
from ebjdat.params import ChainSettings
from ebjdat.pixels import INTERNAL


def pyld(model: WideResNet, x: Tensor, spec: ChainSettings, generator: torch.Generator) -> Tensor:
    """Walk x (B, C, H, W) in [-1, 1] down the marginal energy.

    Each of `spec.steps` outer steps runs the whole network once for the adjoint p = d(-E)/d(stem output); each of
    `spec.inner_steps` inner steps then moves x along d<stem(x), p>/dx, clamped to [-clamp, clamp], through the stem
    alone. The stem is one convolution, so that gradient is the same wherever x is and is computed once per outer step.
    The end point is clamped to [-1, 1], because chains are kept and shown as images.
    """
    x = x.detach()
    for _ in range(spec.steps):
        with torch.enable_grad():
            h = model.stem(x).detach().requires_grad_(True)
            (p,) = torch.autograd.grad(-marginal_energy(model.trunk(h)).sum(), h)
        gradient = model.stem_gradient(p)
        if spec.clamp is not None:
            gradient = gradient.clamp(-spec.clamp, spec.clamp)
        for _ in range(spec.inner_steps):
            x = x + spec.step_size * gradient
            if spec.noise:
                x = x + spec.noise * torch.randn(x.shape, generator=generator, device=x.device)
    return x.clamp(*INTERNAL).detach()
