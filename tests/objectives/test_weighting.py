"""Weights of examples: against a one-dimensional minimisation, closed forms, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ebjdat.objectives import weighting
from ebjdat.settings import ExampleWeights

LOSSES = torch.tensor([0.1, 0.3, 2.0, 0.7, 0.2, 1.1], dtype=torch.float64)
LOGITS = torch.zeros(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.3, 1.0])
def test_kl_dro_is_the_minimum_over_the_multiplier(radius: float) -> None:
    """min over l of l radius + l log mean exp(loss / l) by scipy is sum w loss, and KL(w || uniform) is the radius."""
    w = weighting.kl_dro(LOSSES, LOGITS, ExampleWeights(name="kl_dro", radius=radius)) / len(LOSSES)
    losses = LOSSES.numpy()

    def dual(log_l: float) -> float:
        scale = math.exp(log_l)
        return float(scale * radius + scale * np.log(np.mean(np.exp((losses - losses.max()) / scale))) + losses.max())

    assert float(w @ LOSSES) == pytest.approx(
        minimize_scalar(dual, bounds=(-8, 8), method="bounded", options={"xatol": 1e-10}).fun, abs=1e-7
    )
    assert float((w * (w * len(w)).log()).sum()) == pytest.approx(radius, abs=1e-9)
    assert float(w.sum()) == pytest.approx(1, abs=1e-12)


def test_kl_dro_limits() -> None:
    """Radius to 0: equal weights; from log n on: the greatest loss alone; equal losses stay equal; order does not matter."""
    n = len(LOSSES)
    assert torch.allclose(weighting.kl_dro(LOSSES, LOGITS, ExampleWeights(radius=1e-12)), torch.ones(n).double(), atol=1e-4)
    assert weighting.kl_dro(LOSSES, LOGITS, ExampleWeights(radius=math.log(n) + 0.1)).tolist() == pytest.approx(
        [0, 0, n, 0, 0, 0], abs=1e-6
    )
    assert torch.allclose(weighting.kl_dro(torch.ones(n), LOGITS, ExampleWeights(radius=0.1)), torch.ones(n))
    turned = weighting.kl_dro(LOSSES.flip(0), LOGITS, ExampleWeights(radius=0.3)).flip(0)
    assert torch.allclose(turned, weighting.kl_dro(LOSSES, LOGITS, ExampleWeights(radius=0.3)))


@pytest.mark.parametrize("tilt", [1e-6, 0.5, 3.0])
def test_term_has_the_gradient_of_the_tilted_loss(tilt: float) -> None:
    losses = LOSSES.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad((tilt * losses).exp().mean().log() / tilt, losses)
    found = weighting.term(LOSSES, LOGITS, ExampleWeights(name="term", tilt=tilt)) / len(LOSSES)
    assert torch.allclose(found, expected, atol=1e-8)


def test_weat_at_known_energies() -> None:
    """0.762 at |E| = 1, 0.470 at 2 and -2, 1.443 at 0 (1 / log 2): even in E, and so dependent on a shift of all logits."""
    energies = torch.tensor([1.0, 2.0, -2.0, 5.0, 0.0])
    logits = -energies[:, None] - math.log(3) + torch.zeros(5, 3)
    found = weighting.weat(torch.zeros(5), logits, ExampleWeights())
    assert found.tolist() == pytest.approx([0.762, 0.470, 0.470, 0.200, 1.443], abs=1e-3)


@pytest.mark.parametrize(
    ("control", "expected"), [("none", [1.0, 2.0, 6.0]), ("shuffled", [6.0, 1.0, 2.0]), ("mean_matched", [3.0, 3.0, 3.0])]
)
def test_controls_keep_the_weights_but_not_their_examples(control: str, expected: list[float]) -> None:
    weights: Tensor = torch.tensor([1.0, 2.0, 6.0])
    assert weighting.controlled(weights, control).tolist() == expected
