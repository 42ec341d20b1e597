"""The gradient-prediction screen against closed forms of a linear network, and its controls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.evaluation import screen

from ..conftest import Linear
from ..networks import Curved, images, labelled

RADIUS = 0.05


def linear(x: Tensor) -> tuple[Tensor, Tensor]:
    """Its features are its pixels."""
    return x.flatten(1), Linear()(x)


def curved(x: Tensor) -> tuple[Tensor, Tensor]:
    layers = Curved().layers
    features = layers[:3]((x - 0.5) * 4)
    return features, layers[3](features)


def gradient(network: screen.Network, x: Tensor, y: Tensor) -> Tensor:
    at = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(network(at)[1], y, reduction="sum"), at)[0]


def test_of_a_linear_softmax_it_is_fgsm_bit_by_bit() -> None:
    """Its gradient V^T (p - e_y) is linear in the features; what the penalty takes, 1e-9 of it, turns no sign."""
    x = images(80)
    y = labelled(Linear(), x, 30)
    h, g = screen.hidden_and_gradients(linear, x[20:], y[20:], 16)
    assert torch.allclose(g, (h[:, 16:] @ Linear().weight.detach().double()), atol=1e-5)
    weights = screen.ridge(h, g, 1e-9)
    test, labels = x[:20], y[:20]
    predicted = screen.hidden_and_gradients(linear, test, labels, 16)[0] @ weights
    fgsm = (test + RADIUS * gradient(linear, test, labels).sign()).clamp(0, 1)
    assert torch.equal(screen.stepped(test, predicted, RADIUS), fgsm)
    found = screen.measure(linear, (x[20:], y[20:]), (test, labels), RADIUS, 1e-9, 16, 0)
    assert (found["screen_agreement"], found["screen_success"]) == (1.0, 1.0)


def test_without_weights_nothing_moves() -> None:
    x = images(4)
    assert torch.equal(screen.stepped(x, torch.zeros(4, 16), RADIUS), x)


def test_ridge_regression_against_a_solution_of_the_stacked_system() -> None:
    """min |H W - G|^2 + r |W|^2 is least squares with rows sqrt(r) I and 0 below H and G."""
    rng = torch.Generator().manual_seed(0)
    h, g = torch.randn(30, 5, generator=rng, dtype=torch.float64), torch.randn(30, 3, generator=rng, dtype=torch.float64)
    r = 0.2 * float((h**2).sum(0).mean())
    stacked = torch.cat([h, r**0.5 * torch.eye(5, dtype=torch.float64)]), torch.cat([g, torch.zeros(5, 3, dtype=torch.float64)])
    assert torch.allclose(screen.ridge(h, g, 0.2), torch.linalg.lstsq(*stacked).solution, atol=1e-12)


def test_of_a_curved_network_it_beats_its_controls() -> None:
    """Shuffled features lose what the features say; random signs are half right. 400 images of 16 pixels: standard error 0.6 points."""
    model, x = Curved().eval(), images(800)
    y = labelled(model, x, 0)
    found = screen.measure(curved, (x[:400], y[:400]), (x[400:], y[400:]), RADIUS, 1e-3, 100, 0)
    assert found["n_screen"] == found["n_screen_calibration"] == 400
    assert found["screen_fgsm_broken"] > 50
    assert found["screen_agreement"] > found["screen_shuffled_agreement"] + 0.1
    assert 0.6 < found["screen_success"] <= 1.1
    assert found["screen_random_success"] < 0.5 * found["screen_success"]
    assert found["screen_shuffled_success"] < found["screen_success"]
    again = screen.measure(curved, (x[:400], y[:400]), (x[400:], y[400:]), RADIUS, 1e-3, 33, 0)
    assert again["screen_agreement"] == pytest.approx(found["screen_agreement"], abs=1e-3)  # other batches


def test_only_images_that_are_right_count_and_nothing_is_divided_by_nothing() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x, 0)
    test = y.clone()
    test[:30] = (test[:30] + 1) % 10
    found = screen.measure(curved, (x, y), (x, test), 1e-7, 1e-3, 100, 0)
    assert (found["n_screen"], found["screen_fgsm_broken"], found["screen_success"], found["screen_random_success"]) == (10, 0, None, None)
    assert found["screen_agreement"] > 0.5
    wrong = screen.measure(curved, (x, y), (x, (y + 1) % 10), RADIUS, 1e-3, 100, 0)
    assert wrong == {**wrong, "n_screen": 0, "screen_agreement": None, "screen_fgsm_broken": 0}
    assert wrong.keys() == found.keys()
