"""Energies and their gaps by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebjdat.evaluation import energy

from ..conftest import Linear

N = 24


def test_landscape_by_hand() -> None:
    clean, adversarial, generated = np.array([-5.0, -3.0]), np.array([-4.0, -5.0]), np.array([-1.0, -2.0, -3.0])
    found = energy.landscape(clean, adversarial, generated)
    assert found["energy_gap_adversarial"] == pytest.approx((1 + 2) / 2)
    assert found["energy_shift_adversarial"] == pytest.approx((1 - 2) / 2)
    assert found["energy_gap_generated"] == pytest.approx(2.0)
    assert found["energy_shift_generated"] == pytest.approx(2.0)
    assert found["energy_gap_adversarial_se"] == pytest.approx(np.std([1, 2], ddof=1) / 2**0.5)
    assert found["energy_gap_generated_se"] == pytest.approx((2 / 2 + 1 / 3) ** 0.5)
    assert found["energy_wasserstein_adversarial"] == pytest.approx((0 + 1) / 2)  # sorted: (-5, -5), (-4, -3)


def test_overlap_of_histograms() -> None:
    a = np.linspace(0, 1, 1000)
    assert energy.overlap(a, a) == pytest.approx(1)
    assert energy.overlap(a, a + 5) == 0
    assert energy.overlap(a, a + 0.5) == pytest.approx(0.5, abs=0.03)
    assert energy.overlap(np.ones(3), np.ones(4)) == 1


def test_energies_of_a_network_by_hand(linear: Linear) -> None:
    x, y = torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(N) % 10
    marginal, joint = energy.energies(linear, x, y, batch_size=7)
    logits = linear(x).detach().double().numpy()
    assert marginal == pytest.approx(-np.log(np.exp(logits).sum(1)), rel=1e-6)
    assert joint == pytest.approx(-logits[np.arange(N), y.numpy()], rel=1e-6)
