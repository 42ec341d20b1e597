"""Langevin samplers against a slow, obvious version."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.chains import run_chain
from ebjdat.samplers.sgld import clipped_sgld
from ebjdat.settings import ChainSettings


def slow_langevin(model: WideResNet, x: Tensor, spec: ChainSettings, noise: list[Tensor], clipped: bool, label: int | None) -> Tensor:
    """One image, one step at a time: x + step * d(-E)/dx + noise, with JEM's and SADA-JEM's clamps written out."""
    for k in range(spec.steps):
        x = x.detach().requires_grad_(True)
        logits = model(x[None])[0]
        density = torch.log(torch.exp(logits).sum()) if label is None else logits[label]
        density.backward()
        gradient = x.grad
        assert gradient is not None
        if clipped and spec.clamp is not None:
            gradient = torch.minimum(torch.maximum(gradient, torch.tensor(-spec.clamp)), torch.tensor(spec.clamp))
        x = x.detach() + spec.step_size * gradient + spec.noise * noise[k]
        if clipped:
            x = x.clamp(-1, 1)
    return x.detach()


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", ["sgld", "clipped_sgld"])
def test_langevin_samplers_match_a_slow_loop(name: str, conditional: bool, network: WideResNet, rng: torch.Generator) -> None:
    clamp = None if name == "sgld" else 0.05
    spec = ChainSettings(sampler=name, conditional=conditional, steps=4, step_size=2.0, noise=0.02, clamp=clamp)
    x, y = torch.rand(3, 1, 8, 8, generator=rng) * 2 - 1, torch.tensor([3, 0, 7])
    replay = torch.Generator().manual_seed(5)
    noise = [torch.randn(3, 1, 8, 8, generator=replay) for _ in range(4)]
    with frozen_parameters(network, "eval"):
        fast = run_chain(network, x, y, spec, torch.Generator().manual_seed(5))
        slow = [
            slow_langevin(network, x[i], spec, [n[i] for n in noise], name == "clipped_sgld", int(y[i]) if conditional else None)
            for i in range(3)
        ]
    assert torch.allclose(fast, torch.stack(slow), atol=1e-4)  # float32, four steps of size 2
    assert (fast.abs().max() > 1) == (name == "sgld")  # JEM's chains may leave the range, SADA-JEM's may not
    assert not fast.requires_grad


def test_clamps_of_one_bind_too(network: WideResNet, rng: torch.Generator) -> None:
    """On logits scaled until gradients are beyond 1, one step moves every pixel by at most the step size, many by exactly that."""
    with torch.no_grad():
        network.head.weight.mul_(1e4)
    x = torch.zeros(4, 1, 8, 8)
    with frozen_parameters(network, "eval"):
        moved = clipped_sgld(network, x, marginal_energy, ChainSettings(steps=1, step_size=0.1, clamp=1.0), rng)
    assert moved.abs().max() == pytest.approx(0.1)
    assert (moved.abs() > 0.0999).float().mean() > 0.2
