"""Intervals and tests for counts and means. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a fraction at 95 %."""
    interval = stats.binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Proportion:
    """`correct` of n."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        """The fraction, in [0, 1]."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Its Wilson score interval at 95 %."""
        return wilson(self.correct, self.n)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Student t interval of the mean over seeds at 95 %."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def normal(value: float, standard_error: float) -> tuple[float, float]:
    """Normal interval of an estimate at 95 %."""
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * standard_error
    return value - half, value + half


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, float]:
    """Exact McNemar test of two models on the same examples: (only a is right, only b is right, two-sided p).

    Source: McNemar 1947; exact, since the two counts are binomial with probability 1/2 when the models are equally good.
    """
    if len(a) != len(b):
        raise ValueError(f"verdicts of the same examples are needed, found {len(a)} and {len(b)}")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    total = only_a + only_b
    return only_a, only_b, float(stats.binomtest(only_a, total, 0.5).pvalue) if total else 1.0


def paired_difference(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Interval at 95 % of the difference of two fractions of the same n examples, from those that only one of the two gets right.

    Wald's after adding half an example to each cell (Agresti & Min 2005, Statistics in Medicine 24, 729).
    """
    a, b, total = only_a + 0.5, only_b + 0.5, n + 2
    error = math.sqrt(a + b - (a - b) ** 2 / total) / total
    low, high = normal((a - b) / total, error)
    return max(-1.0, low), min(1.0, high)
