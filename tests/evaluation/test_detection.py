"""Scores and their AUROC against loops, closed forms and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from ebjdat.evaluation import detection
from ebjdat.models.modes import UnitRange
from ebjdat.models.wrn import WideResNet

from ..conftest import Linear


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 8, 40).astype(float), rng.integers(-3, 5, 30).astype(float)  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert detection.auroc(inside, outside) == pytest.approx(np.mean(pairs))
    assert detection.auroc(outside, inside) == pytest.approx(1 - np.mean(pairs))


@pytest.mark.parametrize("area", [0.75, 0.96])
def test_the_interval_holds_the_true_area_as_often_as_it_says(area: float) -> None:
    rng = np.random.default_rng(0)
    shift, held = math.sqrt(2) * norm.ppf(area), 0
    for _ in range(500):
        found = detection.separation(rng.normal(shift, size=60), rng.normal(size=40), "a")
        held += found["a_low"] <= area <= found["a_high"]
    assert 0.925 <= held / 500 <= 0.995  # nominal 0.95, more near 1; 500 samples: standard error 0.01


@pytest.mark.slow
def test_the_interval_against_a_bootstrap_and_at_its_ends() -> None:
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(1.0, size=200), rng.normal(size=150)
    areas = [detection.auroc(rng.choice(inside, 200), rng.choice(outside, 150)) for _ in range(600)]
    found = detection.separation(inside, outside, "a")
    assert (found["a_low"], found["a_high"]) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.015)
    low, high = detection.auroc_interval(1.0, 50, 50)
    assert 0.9 < low < 0.98
    assert high == 1.0
    assert (1 - low) ** 2 == pytest.approx(
        norm.ppf(0.975) ** 2 * low * (1 - low) * (1 + 49 * ((1 - low) / (2 - low) + low / (1 + low))) / 2500
    )
    assert detection.auroc_interval(0.0, 50, 50) == pytest.approx((0.0, 1 - low))


def test_scores_of_a_linear_network_in_closed_form() -> None:
    """d logsumexp(W x + b) / dx = W^T softmax."""
    linear = Linear()
    x = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = detection.logits_of(linear, x, batch_size=3)
    scores = detection.logit_scores(logits)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert scores["energy"] == pytest.approx(np.log(np.exp(logits).sum(1)))
    assert scores["max_probability"] == pytest.approx(p.max(1))
    expected = -np.linalg.norm(p @ linear.weight.detach().double().numpy(), axis=1)
    assert detection.gradient_norm(linear, x, batch_size=3) == pytest.approx(expected, rel=1e-5)
    assert linear.weight.requires_grad
    assert linear.training


def test_gradient_norm_against_the_jacobian(network: WideResNet) -> None:
    """In [0, 1] pixels, in eval mode whatever mode the network is in."""
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = detection.gradient_norm(UnitRange(network).train(), x, batch_size=2)
    network.eval()
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda at: network(2 * at - 1).logsumexp(1), x[i : i + 1])
        assert isinstance(jacobian, Tensor)
        assert found[i] == pytest.approx(-float(jacobian.norm()), rel=1e-4)
