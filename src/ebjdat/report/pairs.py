"""Models compared on the same test examples, from their verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy import stats

from ebjdat.files import FileError, reading
from ebjdat.intervals import mcnemar, over_seeds, paired_difference
from ebjdat.layout import place
from ebjdat.names import STANDARD
from ebjdat.settings import Profile

SIGNIFICANT = 0.05
COLUMNS = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}  # of verdicts.parquet
MOST_VERDICTS = 20_000_000  # rows of a verdicts.parquet: of 50,000 images, 400 protocols


def correct_examples(results: Path, experiment: str, seed: int, column: str, protocol: str = STANDARD) -> list[bool]:
    """Which test examples the raw weights classify correctly under a protocol, in their order. Raises FileError.

    column: of verdicts.parquet, "clean", "pgd20" or "autoattack". An example that is wrong without an attack was not attacked, so
    it is null under pgd20 and counts as wrong; under autoattack null is beyond the first n, and is left out.
    """
    path = results / place(experiment, seed) / "verdicts.parquet"
    with reading(path, largest=None):
        rows = pq.ParquetFile(path).metadata.num_rows  # a few bytes can encode any number of equal rows
        if rows > MOST_VERDICTS:
            raise ValueError(f"{rows:,} rows")
        frame = pd.read_parquet(path, columns=["weights", "protocol", "index", column])
        values = frame[(frame["weights"] == "raw") & (frame["protocol"] == protocol)].sort_values("index")[column]
        values = values.fillna(value=False) if column == "pgd20" else values.dropna()
        if not len(values) or not values.isin([True, False]).all():
            raise ValueError(f"no verdicts of {protocol!r} in {column}")
        return [bool(value) for value in values]


def correct_together(results: Path, experiments: Iterable[str], seed: int, column: str, protocol: str = STANDARD) -> dict[str, list[bool]]:
    """correct_examples of each of these. Raises FileError where their numbers of examples differ."""
    correct = {name: correct_examples(results, name, seed, column, protocol) for name in experiments}
    if len({len(verdicts) for verdicts in correct.values()}) > 1:
        sizes = ", ".join(f"{name} has {len(verdicts)}" for name, verdicts in correct.items())
        raise FileError(f"{results}/*/seed{seed}/verdicts.parquet: not of the same examples ({column}: {sizes}); rerun the attack stage")
    return correct


@dataclass(frozen=True)
class Comparison:
    """How much more of the same test examples a classifies right than b: a difference of fractions, its 95 % interval, and p.

    column, protocol: as for correct_examples. n: examples of a seed. only_a, only_b: examples that one of the two alone gets right,
    over all seeds. Several seeds: Student's t of their differences. One seed, or seeds whose differences are all equal and so have no
    spread to learn from: McNemar's exact test and Agresti and Min's interval, on the examples of all seeds together.
    """

    a: str
    b: str
    column: str
    n: int
    seeds: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p: float
    protocol: str = STANDARD

    @property
    def significant(self) -> bool:
        """Judged by itself at 5 %, without a correction over comparisons."""
        return self.p < SIGNIFICANT

    @property
    def outcome(self) -> Literal["better", "tied", "worse"]:
        """Of a against b. tied: no difference that these examples and seeds can detect."""
        return "tied" if not self.significant else "better" if self.difference > 0 else "worse"

    @property
    def title(self) -> str:
        """Which accuracy is compared, in words. Another protocol's ensemble is not AutoAttack standard."""
        return COLUMNS[self.column] if self.protocol == STANDARD else f"ensemble of {self.protocol}"

    @property
    def points(self) -> str:
        """The difference and its interval, in points."""
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def compared(results: Path, a: str, b: str, seeds: Sequence[int], column: str, protocol: str = STANDARD) -> Comparison:
    """Two experiments under a protocol. Raises FileError for damaged verdicts."""
    counts = []
    for seed in seeds:
        correct = correct_together(results, (a, b), seed, column, protocol)
        counts.append((*mcnemar(correct[a], correct[b])[:2], len(correct[a])))
    only_a, only_b, n = (sum(column) for column in zip(*counts, strict=True))
    differences = [(first - second) / size for first, second, size in counts]
    if len(set(differences)) > 1:
        low, high = over_seeds(differences)
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    else:
        low, high = paired_difference(only_a, only_b, n)
        p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return Comparison(a, b, column, counts[0][2], len(seeds), only_a, only_b, float(np.mean(differences)), low, high, p, protocol)


def with_controls(profile: Profile, results: Path) -> list[Comparison]:
    """Every experiment that names controls (a) against each of them (b): clean, under PGD, and after AutoAttack.

    Where AutoAttack standard was not run, after the ensembles of other protocols. Raises FileError.
    """
    attack = profile.evaluation.attack
    measured = [(column, STANDARD) for column in COLUMNS if column != "autoattack" or attack.standard.n]
    measured += [("autoattack", name) for name, protocol in attack.protocols.items() if protocol.n and not attack.standard.n]
    pairs = [(name, control) for name, entry in profile.experiments.items() for control in entry.control]
    return [compared(results, name, control, profile.seeds, *what) for name, control in pairs for what in measured]


def pairwise(profile: Profile, results: Path, seed: int, column: str) -> list[dict[str, Any]]:
    """Every two experiments on the same examples of one seed: McNemar's counts and p, Holm's correction over all pairs.

    column: as for correct_examples.
    """
    correct = correct_together(results, profile.experiments, seed, column)
    pairs: list[dict[str, Any]] = []
    for a, b in itertools.combinations(correct, 2):
        only_a, only_b, p = mcnemar(correct[a], correct[b])
        pairs.append({"a": a, "b": b, "n": len(correct[a]), "only_a": only_a, "only_b": only_b, "p": p})
    running = 0.0
    for rank, pair in enumerate(sorted(pairs, key=lambda pair: pair["p"])):
        running = max(running, min(1.0, pair["p"] * (len(pairs) - rank)))
        pair["p_holm"] = running
    return pairs
