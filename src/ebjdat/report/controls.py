"""Methods beside their controls: experiments that differ from a method only in what it claims to matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from ebjdat.intervals import mcnemar, over_seeds, paired_difference
from ebjdat.names import STANDARD
from ebjdat.report.pairs import correct_together
from ebjdat.settings import Profile

Outcome = Literal["better than its control", "tied", "worse"]
SIGNIFICANT = 0.05
COLUMNS = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}  # of verdicts.parquet, standard protocol


@dataclass(frozen=True)
class Comparison:
    """An experiment less its control on the same test examples, in fractions: difference, its 95 % interval, n examples, p.

    Over several seeds: Student's t of the seeds' differences. One seed, or seeds whose differences are all equal: McNemar's exact test
    and Agresti and Min's interval on their examples together. "tied": no difference that these examples and seeds can detect.
    """

    experiment: str
    control: str
    column: str
    n: int
    seeds: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def title(self) -> str:
        """What was compared, in words."""
        return COLUMNS[self.column]

    @property
    def points(self) -> str:
        """The difference and its interval, in points."""
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    @property
    def outcome(self) -> Outcome:
        """Judged by this comparison alone at 5 %, without a correction over comparisons."""
        if not self.p < SIGNIFICANT:
            return "tied"
        return "better than its control" if self.difference > 0 else "worse"


def compare(profile: Profile, results: Path) -> list[Comparison]:
    """Every experiment that names a control, under each column that was measured. Raises FileError for damaged verdicts."""
    columns = [column for column in COLUMNS if column != "autoattack" or profile.evaluation.attack.protocols[STANDARD].n]
    pairs = [(name, entry.control) for name, entry in profile.experiments.items() if entry.control]
    return [_compared(profile.seeds, results, name, control, column) for name, control in pairs for column in columns]


def _compared(seeds: Sequence[int], results: Path, experiment: str, control: str, column: str) -> Comparison:
    counts = []
    for seed in seeds:
        correct = correct_together(results, (experiment, control), seed, column)
        counts.append((*mcnemar(correct[experiment], correct[control]), len(correct[experiment])))
    differences = [(own - reference) / n for own, reference, _, n in counts]
    if len(counts) > 1 and len({own - reference for own, reference, _, _ in counts}) > 1:
        low, high = over_seeds(differences)
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    else:  # one seed, or seeds without a spread to learn from: the examples of all together
        own, reference = sum(count[0] for count in counts), sum(count[1] for count in counts)
        low, high = paired_difference(own, reference, sum(n for _, _, _, n in counts))
        p = float(stats.binomtest(own, own + reference, 0.5).pvalue) if own + reference else 1.0
    return Comparison(experiment, control, column, counts[0][3], len(counts), float(np.mean(differences)), low, high, p)
