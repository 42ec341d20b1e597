"""Measures of samples against slow loops."""

from __future__ import annotations

import numpy as np
import pytest

from ebjdat.evaluation import fidelity
from ebjdat.evaluation.frechet import Features, frechet_distance


def slow_kid(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD by its definition, one pair at a time."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(s: np.ndarray) -> float:
        return sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))

    return within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_against_a_slow_loop(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = flat[:40], 1 - flat[100:140]
    monkeypatch.setattr(fidelity, "KID_SHARE", 1)  # every subset is the whole set
    mean, spread, size = fidelity.kernel_distance(a, b)
    assert size == 40
    assert mean == pytest.approx(slow_kid(a, b), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-12)


def test_kid_over_subsets_is_unbiased_and_its_subsets_follow_the_smaller_set(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = flat[:300], 0.7 * flat[300:1000]
    mean, spread, size = fidelity.kernel_distance(a, b)
    assert size == 30
    assert fidelity.kernel_distance(a, b) == (mean, spread, size)
    assert mean == pytest.approx(slow_kid(a[:150], b[:150]), rel=0.2)  # another estimate of the same number
    assert 0 < spread < mean
    same, _, _ = fidelity.kernel_distance(flat[:800], flat[800:1600])
    assert abs(same) < 0.05 * mean
    assert fidelity.kernel_distance(flat[:3], flat[:700])[2] == 2
    monkeypatch.setattr(fidelity, "KID_SUBSETS", 1)
    assert fidelity.kernel_distance(np.zeros((20_000, 2)), np.ones((15_000, 2)))[2] == 1000


def test_precision_and_recall_against_a_slow_loop(flat: np.ndarray) -> None:
    samples = np.concatenate([0.9 * flat[:40], 1 - flat[40:50]])  # ten lie nowhere near a digit
    real = flat[200:320]

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radius = [sorted(np.linalg.norm(c - other) for other in centres)[3] for c in centres]  # the nearest is c itself
        return sum(any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points) / len(points)

    found = fidelity.precision_recall(samples, real)
    assert found == pytest.approx((covered(samples, real), covered(real, samples)), abs=1e-6)  # float32 means
    assert found is not None
    assert abs(found[0] - found[1]) > 0.05  # else they could be exchanged
    assert fidelity.precision_recall(samples[:3], real) is None


def test_precision_and_recall_of_a_large_set_are_those_of_its_parts(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fidelity.precision_recall(0.9 * flat[:100], flat[300:500])
    monkeypatch.setattr(fidelity, "CHUNK", 30)
    assert fidelity.precision_recall(0.9 * flat[:100], flat[300:500]) == pytest.approx(whole, abs=0.011)  # one point at a ball's edge


def numpy_score(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def test_class_score_against_its_formula() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 10)) * 3
    shuffled = logits[np.random.RandomState(2020).permutation(200)]  # torch-fidelity's own order
    parts = [numpy_score(part) for part in np.split(shuffled, 10)]
    assert fidelity.class_score(logits) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    assert fidelity.class_score(np.tile(60 * np.eye(10), (1, 1)))[0] == pytest.approx(1)  # ten splits of one image
    assert fidelity.class_score(logits[:3])[0] >= 1


def test_a_score_has_its_extractors_name(flat: np.ndarray) -> None:
    features = Features(lambda images: flat, lambda seen: seen[:, :10] * 20)
    for own, other in (("inception", "reference"), ("reference", "inception")):
        found = fidelity.compare(flat[:50], flat[50:200], own, features)
        assert tuple(found) == fidelity.MEASURES
        assert found[f"{own}_score"] == fidelity.class_score(flat[:50, :10] * 20)[0]
        assert found[f"{own}_score_std"] == fidelity.class_score(flat[:50, :10] * 20)[1]
        assert found[f"{other}_score"] is None
        assert found["frechet"] == frechet_distance(flat[:50], flat[50:200])
    few = fidelity.compare(flat[:3], flat[50:200], "reference", features)
    assert few["frechet"] is not None
    assert few["precision"] is None
    assert set(fidelity.compare(flat[:1], flat, "reference", features).values()) == {None}
    assert fidelity.compare(None, flat, "reference", features) == dict.fromkeys(fidelity.MEASURES)


def test_the_frechet_distance_falls_with_n_and_kid_does_not(flat: np.ndarray) -> None:
    """Halves of one data set: the true distance is 0, and what is found depends on n. So every distance has its n beside it."""
    found = {n: frechet_distance(flat[:n], flat[900:]) for n in (40, 200, 800)}
    assert found[40] > 1.8 * found[200] > 1.8 * 1.8 * found[800] > 0
    kid, spread, _ = fidelity.kernel_distance(flat[:40], flat[900:])
    assert abs(kid) < spread
