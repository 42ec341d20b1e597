"""Energies of logits by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ebjdat.models.energy import joint_energy, marginal_energy


def test_energies_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1000.0]])
    by_hand = [-math.log(math.exp(1) + math.exp(2) + math.exp(3)), -1000.0]
    assert marginal_energy(logits).tolist() == pytest.approx(by_hand, rel=1e-6)
    assert joint_energy(logits, torch.tensor([0, 2])).tolist() == [-1.0, -1000.0]


def test_joint_and_marginal_energy_give_the_classifier() -> None:
    """p(y|x) = exp(E(x) - E(x, y)) is the softmax."""
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0])
    found = (marginal_energy(logits) - joint_energy(logits, y)).exp()
    assert torch.allclose(found, logits.softmax(1)[torch.arange(5), y], atol=1e-6)  # float32
