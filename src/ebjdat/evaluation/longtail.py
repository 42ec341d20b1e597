"""Accuracy on frequent and on rare classes, from verdicts: for networks that were trained on a long-tailed split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ebjdat.evaluation.verdicts import statistics
from ebjdat.intervals import Proportion

TAIL = 0.8  # share of the classes, the smallest ones; RobustLT's (arXiv 2605.13395): 8 of 10


def head_and_tail(counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes by their number of training images: "head", the largest, and "tail", the smallest 80 % of at least two classes.

    The share is rounded to whole classes, so that each has at least one. Of equally large classes, the first counts as larger.
    """
    by_size = sorted(range(len(counts)), key=lambda c: -counts[c])
    head = max(1, len(counts) - max(1, round(TAIL * len(counts))))
    return {"head": sorted(by_size[:head]), "tail": sorted(by_size[head:])}


def accuracies(table: pa.Table, classes: Mapping[str, Sequence[int]], pgd: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """protocol -> attack -> statistic -> value for names.flat_results: `head_acc` and so on, of the test images of these classes.

    table: verdicts of one network (verdicts.columns). pgd: protocol -> the name of its PGD. An image that is wrong without an attack is
    wrong under PGD; the ensemble counts its own images alone. What there is no image for is left out.
    """
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for protocol, name in pgd.items():
        rows = table.filter(np.array(table["protocol"].to_pylist()) == protocol)
        labels = np.array(rows["label"].to_pylist())
        clean, ensemble = (rows[column].to_pylist() for column in ("clean", "autoattack"))
        verdicts = {"clean": clean, name: [value is True for value in rows[name].to_pylist()], "autoattack": ensemble}
        found = results.setdefault(protocol, {"": {}})
        for group, members in classes.items():
            belongs: NDArray[np.bool_] = np.isin(labels, members)
            for attack, values in verdicts.items():
                mine = [value for value, own in zip(values, belongs, strict=True) if own and value is not None]
                if mine:
                    of_group = statistics(Proportion(sum(mine), len(mine)))
                    found.setdefault(attack, {}).update({f"{group}_{statistic}": value for statistic, value in of_group.items()})
                    found[""][f"n_attack_{group}" if attack == "autoattack" else f"n_{group}"] = len(mine)
    return results
