"""What holds for every sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ebjdat import registry
from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.chains import run_chain
from ebjdat.samplers.pyld import pyld
from ebjdat.samplers.sgld import clipped_sgld, sgld
from ebjdat.settings import ChainSettings


def test_conditional_chains_go_to_their_class(network: WideResNet, rng: torch.Generator) -> None:
    x, y = torch.rand(20, 1, 8, 8, generator=rng) * 2 - 1, torch.arange(20) % 10
    spec = ChainSettings(steps=10, step_size=0.02)
    with frozen_parameters(network, "eval"):
        free, bound = (run_chain(network, x, y, spec.model_copy(update={"conditional": c}), rng) for c in (False, True))
        joint, marginal = network(bound)[range(20), y], network(free)[range(20), y]
        assert (joint > network(x)[range(20), y]).all()
    assert (joint > marginal).float().mean() > 0.9


@pytest.mark.parametrize("sampler", [sgld, clipped_sgld, pyld])
def test_samplers_read_the_settings_that_the_registry_says(sampler: Any, network: WideResNet, rng: torch.Generator) -> None:
    """`ebjdat methods` lists them; a setting that is not read would be changed by a user for nothing."""
    seen: set[str] = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            seen.add(name)
            return getattr(ChainSettings(noise=0.01), name)

    with frozen_parameters(network, "eval"):
        sampler(network, torch.zeros(1, 1, 8, 8), marginal_energy, Watched(), rng)
    assert seen == set(registry.SAMPLERS[sampler.__name__].reads)


@pytest.mark.parametrize("sampler", [pyld, clipped_sgld])
def test_noise_does_not_leave_the_range(sampler: Any, network: WideResNet, rng: torch.Generator) -> None:
    with frozen_parameters(network, "eval"):
        moved = sampler(network, torch.zeros(8, 1, 8, 8), marginal_energy, ChainSettings(steps=2, noise=2.0), rng)
    assert moved.abs().max() == 1
