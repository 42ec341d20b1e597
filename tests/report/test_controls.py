"""Methods beside their controls: differences, tests and outcomes from verdicts that are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ebjdat.report import controls
from ebjdat.settings import STANDARD

N = 200


def verdicts(results: Path, name: str, seed: int, right: np.ndarray[Any, Any]) -> None:
    path = results / name / f"seed{seed}" / "verdicts.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"weights": "raw", "protocol": STANDARD, "index": range(N), "clean": True, "pgd20": right, "autoattack": right}
    pd.DataFrame(rows).to_parquet(path)


def profile(seeds: list[int], ensemble: int = N) -> Any:
    of = {"method": SimpleNamespace(control="control"), "control": SimpleNamespace(control=None)}
    attack = SimpleNamespace(protocols={STANDARD: SimpleNamespace(n=ensemble)})
    return SimpleNamespace(seeds=seeds, experiments=of, evaluation=SimpleNamespace(attack=attack))


def made(results: Path, extra: list[int]) -> None:
    """For each seed the method is right on `extra` images more than the control, which is right on 100."""
    for seed, more in enumerate(extra):
        verdicts(results, "control", seed, np.arange(N) < 100)
        verdicts(results, "method", seed, np.arange(N) < 100 + more)


@pytest.mark.parametrize(("more", "outcome"), [(12, "better than its control"), (3, "tied"), (-12, "worse")])
def test_one_seed_by_mcnemars_test(more: int, outcome: str, tmp_path: Path) -> None:
    made(tmp_path, [more])
    clean, pgd, ensemble = controls.compare(profile([0]), tmp_path)
    assert (pgd.outcome, pgd.difference, pgd.n, pgd.seeds) == (outcome, more / N, N, 1)
    assert pgd.p == pytest.approx(min(1.0, 2 * 0.5 ** abs(more)))  # all discordant examples on one side
    assert (clean.outcome, clean.difference, clean.p) == ("tied", 0, 1)
    assert (ensemble.column, ensemble.outcome) == ("autoattack", outcome)
    assert [c.column for c in controls.compare(profile([0], ensemble=0), tmp_path)] == ["clean", "pgd20"]


@pytest.mark.parametrize(
    ("extra", "outcome"), [([10, 12, 14], "better than its control"), ([-10, 12, 14], "tied"), ([-9, -12, -14], "worse")]
)
def test_several_seeds_by_students_test(extra: list[int], outcome: str, tmp_path: Path) -> None:
    made(tmp_path, extra)
    _, pgd, _ = controls.compare(profile([0, 1, 2]), tmp_path)
    differences = [more / N for more in extra]
    assert pgd.outcome == outcome
    assert pgd.difference == pytest.approx(np.mean(differences))
    assert pgd.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    interval = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert (pgd.low, pgd.high) == pytest.approx(interval)
    assert ((pgd.low > 0) or (pgd.high < 0)) == (outcome != "tied")


@pytest.mark.parametrize(("more", "outcome"), [(1, "tied"), (0, "tied"), (5, "better than its control")])
def test_seeds_with_equal_differences_are_judged_by_their_examples(more: int, outcome: str, tmp_path: Path) -> None:
    """Their spread is 0, so Student's t would be certain of any difference: 3 more of 600 are no evidence (p = 0.25), 15 are."""
    made(tmp_path, [more] * 3)
    _, pgd, _ = controls.compare(profile([0, 1, 2]), tmp_path)
    assert (pgd.outcome, pgd.p) == (outcome, pytest.approx(min(1.0, 2 * 0.5 ** (3 * more))))
    assert pgd.low < pgd.difference < pgd.high
