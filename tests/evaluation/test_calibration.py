"""Calibration against loops and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss

from ebjdat.evaluation import calibration


def drawn(n: int, classes: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n, classes))
    p = np.exp(logits / temperature)
    p /= p.sum(1, keepdims=True)
    return logits, (p.cumsum(1) < rng.random((n, 1))).sum(1)


def slow_ece(p: np.ndarray, labels: np.ndarray, bins: int) -> float:
    total = 0.0
    for k in range(bins):
        inside = [i for i in range(len(p)) if k / bins < max(p[i]) <= (k + 1) / bins]
        if inside:
            accuracy = sum(p[i].argmax() == labels[i] for i in inside) / len(inside)
            confidence = sum(max(p[i]) for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_a_loop(bins: int) -> None:
    logits, labels = drawn(400, 5, temperature=2.0)
    p = calibration.probabilities(logits)
    found = calibration.expected_calibration_error(calibration.reliability_curve(p, labels, bins))
    assert found == pytest.approx(slow_ece(p, labels, bins), abs=1e-12)
    assert found > 0.05


def test_a_reliability_curve_by_hand() -> None:
    """0.9 right, 0.9 wrong, 0.6 right; and one half, which belongs to the lower of two bins."""
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    curve = calibration.reliability_curve(p, np.array([0, 0, 0]), 10)
    assert calibration.expected_calibration_error(curve) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert np.flatnonzero(curve["share"]).tolist() == [5, 8]
    assert curve["share"][[5, 8]] == pytest.approx([1 / 3, 2 / 3])
    assert curve["accuracy"][[5, 8]].tolist() == [1.0, 0.5]
    assert np.isnan(curve["accuracy"][0])
    z2 = norm.ppf(0.975) ** 2
    half = z2**0.5 * math.sqrt(0.25 / 2 + z2 / 16) / (1 + z2 / 2)  # Wilson for 1 of 2
    assert (curve["low"][8], curve["high"][8]) == pytest.approx((0.5 - half, 0.5 + half))
    assert calibration.reliability_curve(np.full((1, 2), 0.5), np.array([0]), 2)["share"].tolist() == [1.0, 0.0]


def test_likelihood_and_brier_score_against_scikit_learn() -> None:
    logits, labels = drawn(200, 4, temperature=1.0)
    p = calibration.probabilities(logits, 1.7)
    assert p == pytest.approx(np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(1, keepdims=True))
    assert calibration.negative_log_likelihood(logits, labels, 1.7) == pytest.approx(log_loss(labels, p))
    assert calibration.brier_score(p, labels) == pytest.approx(sum(brier_score_loss(labels == k, p[:, k]) for k in range(4)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    logits, labels = drawn(20_000, 6, temperature)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.04)  # 20,000 samples: standard error about 1 %
    assert found is not None
    around = [calibration.negative_log_likelihood(logits, labels, found * f) for f in (0.99, 1.0, 1.01)]
    assert around[1] == min(around)


def test_without_a_minimum_there_is_no_temperature() -> None:
    sure = 5 * np.eye(4)
    assert calibration.fit_temperature(sure, np.arange(4)) is None  # no error: ever colder
    assert calibration.fit_temperature(sure, (np.arange(4) + 1) % 4) is None  # nothing right: ever hotter
    result, curves = calibration.measure(sure, np.arange(4), 2.0, 15)
    assert result["nll"] == pytest.approx(math.log(1 + 3 * math.exp(-5)))
    assert result["nll_scaled"] == pytest.approx(math.log(1 + 3 * math.exp(-2.5)))
    assert list(curves) == ["as trained", "temperature scaled"]
