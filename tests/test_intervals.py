"""Intervals and tests against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from ebjdat.intervals import mcnemar, normal, over_seeds, paired_difference, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (7, 10), (10, 10), (450, 497)])
def test_wilson_by_its_formula(correct: int, n: int) -> None:
    """Wilson 1927: the roots of (p - f)^2 = z^2 p (1 - p) / n."""
    f = correct / n
    centre, half = (f + Z * Z / (2 * n)) / (1 + Z * Z / n), Z / (1 + Z * Z / n) * (f * (1 - f) / n + Z * Z / (4 * n * n)) ** 0.5
    assert wilson(correct, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_student_and_normal_intervals() -> None:
    expected = scipy.stats.ttest_1samp([0.90, 0.89, 0.88], 0).confidence_interval(0.95)
    assert over_seeds([0.90, 0.89, 0.88]) == pytest.approx((expected.low, expected.high))
    assert normal(2.0, 0.5) == pytest.approx((2 - Z / 2, 2 + Z / 2))


def test_mcnemar_counts_only_disagreements() -> None:
    """Five examples that only b has right: p = 2 / 2^5. Agreement says nothing."""
    a, b = [True, True, False, *[False] * 5], [True, True, False, *[True] * 5]
    assert mcnemar(a, b) == (0, 5, pytest.approx(2 / 2**5))
    assert mcnemar(a, a) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="8 and 7"):
        mcnemar(a, b[:7])


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(12, 4, 100), (0, 0, 60), (30, 5, 400)])
def test_paired_difference_covers(only_a: int, only_b: int, n: int) -> None:
    """The interval contains the estimate, and the true difference in about 95 % of 4,000 simulated sets (at least 93 %)."""
    low, high = paired_difference(only_a, only_b, n)
    assert low <= (only_a - only_b) / n <= high
    rng = np.random.default_rng(0)
    p = (np.array([only_a, only_b, n - only_a - only_b]) + 0.5) / (n + 1.5)
    true, inside = p[0] - p[1], 0
    for a, b, _ in rng.multinomial(n, p, size=4000):
        low, high = paired_difference(int(a), int(b), n)
        inside += low <= true <= high
    assert inside / 4000 > 0.93
