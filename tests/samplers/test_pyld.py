"""PYLD against a slow, obvious version."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.pyld import pyld
from ebjdat.settings import ChainSettings


def slow_pyld(model: WideResNet, x: Tensor, spec: ChainSettings) -> Tensor:
    """PYLD one image at a time; the inner gradient as the stem's transposed convolution, written out by pixel."""
    weight = model.stem.weight.detach()  # (16, 1, 3, 3)
    for _ in range(spec.steps):
        h = model.stem(x).detach().requires_grad_(True)
        model.trunk(h).logsumexp(1).sum().backward()
        p = h.grad
        assert p is not None
        gradient = torch.zeros_like(x)
        for i in range(8):
            for j in range(8):
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < 8 and 0 <= j + dj < 8:
                            gradient[:, 0, i + di, j + dj] += p[:, :, i, j] @ weight[:, 0, 1 + di, 1 + dj]
        for _ in range(spec.inner_steps):  # clamped after each, as JEM++'s code does
            x = (x + spec.step_size * (gradient if spec.clamp is None else gradient.clamp(-spec.clamp, spec.clamp))).clamp(-1, 1)
    return x


@pytest.mark.parametrize("clamp", [None, 0.01, 1.0])
def test_pyld_matches_a_slow_loop(clamp: float | None, network: WideResNet, rng: torch.Generator) -> None:
    spec = ChainSettings(steps=3, inner_steps=2, step_size=0.5, clamp=clamp, noise=0.0)
    x = torch.rand(3, 1, 8, 8, generator=rng) * 2 - 1
    with frozen_parameters(network, "eval"):
        fast, slow = pyld(network, x, marginal_energy, spec, rng), slow_pyld(network, x, spec)
    assert (fast - x).abs().max() > 1e-3
    assert (clamp is not None) or fast.abs().max() == 1  # the range binds
    assert torch.allclose(fast, slow, atol=1e-5)  # float32 sums in another order


def test_pyld_runs_the_trunk_once_per_outer_step(network: WideResNet, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, trunk = [], network.trunk
    monkeypatch.setattr(network, "trunk", lambda h: calls.append(1) or trunk(h))
    with frozen_parameters(network, "eval"):
        pyld(network, torch.zeros(2, 1, 8, 8), marginal_energy, ChainSettings(steps=3, inner_steps=7), rng)
    assert len(calls) == 3


def test_stem_gradient_is_autograds(network: WideResNet, rng: torch.Generator) -> None:
    x, p = torch.randn(2, 1, 9, 9, generator=rng, requires_grad=True), torch.randn(2, 16, 9, 9, generator=rng)
    (expected,) = torch.autograd.grad((network.stem(x) * p).sum(), x)
    assert torch.allclose(network.stem_gradient(p), expected, atol=1e-5)  # float32


def test_pyld_goes_down_the_energy_and_stays_an_image(network: WideResNet, rng: torch.Generator) -> None:
    x = torch.rand(64, 1, 8, 8, generator=rng) * 2 - 1
    with frozen_parameters(network, "eval"):
        moved = pyld(network, x, marginal_energy, ChainSettings(steps=5, step_size=0.02), rng)
        assert (network(moved).logsumexp(1) > network(x).logsumexp(1)).all()
    assert moved.abs().max() <= 1
    assert not moved.requires_grad


def test_pyld_noise_is_per_outer_step(network: WideResNet) -> None:
    """With steps too small to matter, what remains is the sum of `steps` independent draws."""
    spec = ChainSettings(steps=2, inner_steps=3, step_size=1e-9, noise=0.01)
    x = torch.zeros(64, 1, 8, 8)
    with frozen_parameters(network, "eval"):
        moved = pyld(network, x, marginal_energy, spec, torch.Generator().manual_seed(1))
    assert moved.std() == pytest.approx(0.01 * 2**0.5, rel=0.05)  # 4096 samples: standard error 1 %
