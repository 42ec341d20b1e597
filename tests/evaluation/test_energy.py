"""Energies and their gaps by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebjdat import registry
from ebjdat.evaluation import energy
from ebjdat.metrics import ENERGY_ATTACKS

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


def test_signed_changes_by_hand() -> None:
    """The mean of |E(x~) - E(x)| is 2 for both; the sign tells them apart. A pair without a finite energy is left out."""
    clean = np.array([-1.0, -2.0, -3.0, -4.0])
    attacked = {"down": clean - 2, "both": clean + np.array([2, -2, 2, np.nan]), "lost": np.full(4, np.inf)}
    found = energy.changes(clean, attacked)
    assert (found["energy_change_down"], found["energy_change_down_se"], found["energy_rise_down"]) == (-2, 0, 0)
    assert found["energy_change_both"] == pytest.approx(2 / 3)
    assert found["energy_change_both_se"] == pytest.approx(np.std([2, -2, 2], ddof=1) / 3**0.5)
    assert found["energy_rise_both"] == pytest.approx(2 / 3)
    assert [found[f"n_energy_change_{name}"] for name in attacked] == [4, 3, 0]
    assert np.isnan(found["energy_change_lost"])


def test_each_score_moves_what_it_names(linear: Linear) -> None:
    """Against autograd on formulas written out: (y + 1) mod K, E alone, CE - E, |p - p(x)|^2."""
    rng = torch.Generator().manual_seed(1)
    x, moved = (torch.rand(N, 1, 4, 4, generator=rng) for _ in range(2))
    y = torch.arange(N) % 10
    z, clean = linear(moved), linear(x).softmax(1)
    ce = -z.log_softmax(1)[range(N), y]
    expected = {
        "targeted_ce": z.log_softmax(1)[range(N), [(int(k) + 1) % 10 for k in y]],
        "marginal_energy": -z.exp().sum(1).log(),
        "energy_ce": ce + z.exp().sum(1).log(),
        "squared": ((z.softmax(1) - clean) ** 2).sum(1),
    }
    for name, value in expected.items():
        assert torch.allclose(registry.load(registry.SCORES, name)(linear, x, y)(moved), value, atol=1e-5), name


def test_metrics_names_the_attacks() -> None:
    assert set(ENERGY_ATTACKS) == {energy.UNTARGETED, *energy.ATTACKS}
