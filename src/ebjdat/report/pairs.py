"""Models compared on the same test examples, from their verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from ebjdat.files import FileError, reading
from ebjdat.intervals import mcnemar
from ebjdat.layout import place
from ebjdat.names import STANDARD
from ebjdat.settings import Profile

MOST_VERDICTS = 20_000_000  # rows of a verdicts.parquet: of 50,000 images, 400 protocols


def correct_examples(results: Path, experiment: str, seed: int, column: str) -> list[bool]:
    """Which test examples the raw weights classify correctly under the standard protocol, in their order. Raises FileError.

    column: of verdicts.parquet, "clean", "pgd20" or "autoattack". An example that is wrong without an attack was not attacked, so
    it is null under pgd20 and counts as wrong; under autoattack null is beyond the first n, and is left out.
    """
    path = results / place(experiment, seed) / "verdicts.parquet"
    with reading(path, largest=None):
        rows = pq.ParquetFile(path).metadata.num_rows  # a few bytes can encode any number of equal rows
        if rows > MOST_VERDICTS:
            raise ValueError(f"{rows:,} rows")
        frame = pd.read_parquet(path, columns=["weights", "protocol", "index", column])
        values = frame[(frame["weights"] == "raw") & (frame["protocol"] == STANDARD)].sort_values("index")[column]
        values = values.fillna(value=False) if column == "pgd20" else values.dropna()
        if not len(values) or not values.isin([True, False]).all():
            raise ValueError(f"no verdicts of {STANDARD!r} in {column}")
        return [bool(value) for value in values]


def correct_together(results: Path, experiments: Iterable[str], seed: int, column: str) -> dict[str, list[bool]]:
    """correct_examples of each of these. Raises FileError where their numbers of examples differ."""
    correct = {name: correct_examples(results, name, seed, column) for name in experiments}
    if len({len(verdicts) for verdicts in correct.values()}) > 1:
        sizes = ", ".join(f"{name} has {len(verdicts)}" for name, verdicts in correct.items())
        raise FileError(f"{results}/*/seed{seed}/verdicts.parquet: not of the same examples ({column}: {sizes}); rerun the attack stage")
    return correct


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
