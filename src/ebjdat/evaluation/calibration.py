"""Calibration: whether predictions with confidence p are right in a share p of cases. Logits are (N, K) and finite, labels (N,)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve

from ebjdat.intervals import wilson

Values = NDArray[np.float64]
Labels = NDArray[np.int64]

COLDEST, HOTTEST = 0.02, 50.0  # range of temperatures


def probabilities(logits: Values, temperature: float = 1.0) -> Values:
    """softmax(logits / temperature), (N, K)."""
    return np.exp(log_softmax(logits / temperature, axis=1))


def negative_log_likelihood(logits: Values, labels: Labels, temperature: float = 1.0) -> float:
    """Mean of -log p(y | x), in nats."""
    return float(-log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean())


def brier_score(p: Values, labels: Labels) -> float:
    """Mean over images of the squared distance of p (N, K) to the one-hot label, in [0, 2] (Brier 1950)."""
    return float(np.square(p - np.eye(p.shape[1])[labels]).sum(1).mean())


def reliability_curve(p: Values, labels: Labels, bins: int) -> dict[str, Values]:
    """Images by their confidence max p, in `bins` equal bins (low, high] of [0, 1], the first closed.

    Returns arrays (bins,): mean `confidence`, `accuracy` and its 95 % Wilson interval `low`, `high`, all in [0, 1] and nan
    where a bin is empty; and the `share` of images.
    """
    confidence, correct = p.max(1), p.argmax(1) == labels
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    count = np.bincount(place, minlength=bins)
    curve = {name: np.full(bins, math.nan) for name in ("confidence", "accuracy", "low", "high")}
    # scikit-learn puts images into the same bins, and leaves the empty ones out
    curve["accuracy"][count > 0], curve["confidence"][count > 0] = calibration_curve(correct, confidence, n_bins=bins)
    for k in np.flatnonzero(count):
        curve["low"][k], curve["high"][k] = wilson(int(correct[place == k].sum()), int(count[k]))
    return {**curve, "share": count / len(labels)}


def expected_calibration_error(curve: dict[str, Values]) -> float:
    """Sum over bins of share x |accuracy - confidence|, in [0, 1] (Guo et al. 2017, arXiv 1706.04599, equation 3)."""
    gap = np.abs(curve["accuracy"] - curve["confidence"])
    return float(np.nansum(curve["share"] * gap))


def fit_temperature(logits: Values, labels: Labels) -> float | None:
    """The T > 0 that minimises the mean -log softmax(logits / T)[y] (temperature scaling, Guo et al. 2017).

    None where there is no such T between COLDEST and HOTTEST: without an error, the likelihood grows as T falls to 0; and
    with logits that are worse than a guess, as T rises.
    """
    if (logits.argmax(1) == labels).all():
        return None

    def nll(log_temperature: float) -> float:  # has one minimum: it is convex in 1 / T
        return negative_log_likelihood(logits, labels, math.exp(log_temperature))

    ends = (math.log(COLDEST), math.log(HOTTEST))
    temperature = math.exp(minimize_scalar(nll, bounds=ends, method="bounded", options={"xatol": 1e-6}).x)
    return temperature if COLDEST * 1.001 < temperature < HOTTEST / 1.001 else None


def measure(logits: Values, labels: Labels, temperature: float, bins: int) -> tuple[dict[str, float], dict[str, dict[str, Values]]]:
    """ece, nll and brier of the logits as they are, and `*_scaled`, after division by the temperature; both curves."""
    result, curves = {}, {}
    for suffix, title, t in (("", "as trained", 1.0), ("_scaled", "temperature scaled", temperature)):
        p = probabilities(logits, t)
        curves[title] = reliability_curve(p, labels, bins)
        result[f"ece{suffix}"] = expected_calibration_error(curves[title])
        result[f"nll{suffix}"] = negative_log_likelihood(logits, labels, t)
        result[f"brier{suffix}"] = brier_score(p, labels)
    return result, curves
