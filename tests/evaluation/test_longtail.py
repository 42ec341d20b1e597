"""Accuracy on frequent and rare classes, against slow loops over verdicts."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest
import torch

from ebjdat.evaluation.audit import audit
from ebjdat.evaluation.longtail import accuracies, head_and_tail
from ebjdat.intervals import wilson
from ebjdat.metrics import describe
from ebjdat.names import flat_results
from ebjdat.settings import ImbalanceSettings

from ..networks import Curved, images, labelled, settings


def test_the_tail_is_four_fifths_of_the_classes_rounded() -> None:
    assert head_and_tail(ImbalanceSettings(ratio=50, largest=5000).drawn(10)) == {"head": [0, 1], "tail": [2, 3, 4, 5, 6, 7, 8, 9]}
    assert head_and_tail([3, 9, 1, 9, 9]) == {"head": [1], "tail": [0, 2, 3, 4]}  # of equal ones the first
    assert head_and_tail([5, 7]) == {"head": [1], "tail": [0]}
    assert [len(head_and_tail(range(k))["tail"]) for k in (2, 3, 4, 5, 7, 100)] == [1, 2, 3, 4, 6, 80]


def slow(rows: list[dict[str, Any]], classes: list[int], column: str) -> tuple[int, int]:
    """How many of a protocol's images of these classes are right, and how many there are."""
    right = n = 0
    for row in rows:
        if row["label"] not in classes:
            continue
        if column == "autoattack" and row["autoattack"] is None:
            continue
        n += 1
        if row[column] is True:
            right += 1
    return right, n


def random_rows(n: int, ensemble: int) -> list[dict[str, Any]]:
    """Verdicts as verdicts.columns makes them: PGD is None where the clean image is wrong, the ensemble after so many images."""
    draw = random.Random(0)
    rows = []
    for protocol, pgd in (("standard", "pgd20"), ("mine", "pgd7")):
        for i in range(n):
            clean = draw.random() < 0.7
            row = {"protocol": protocol, "label": draw.randrange(10), "clean": clean, "pgd20": None, "pgd7": None}
            row[pgd] = draw.random() < 0.5 if clean else None
            rows.append(row | {"autoattack": (clean and draw.random() < 0.4) if i < ensemble else None})
    return rows


def test_accuracies_by_a_slow_loop() -> None:
    rows = random_rows(200, 40)
    classes = {"head": [4, 1], "tail": [0, 2, 3, 5, 6, 7, 8, 9]}
    found = flat_results(accuracies(pa.Table.from_pylist(rows), classes, {"standard": "pgd20", "mine": "pgd7"}))
    for protocol, prefix, pgd in (("standard", "", "pgd20"), ("mine", "mine_", "pgd7")):
        own = [row for row in rows if row["protocol"] == protocol]
        for group, members in classes.items():
            for attack in ("clean", pgd, "autoattack"):
                right, n = slow(own, members, attack)
                name = f"{prefix}{attack}_{group}"
                assert (found[f"{name}_correct"], found[f"{name}_acc"]) == (right, right / n)
                assert (found[f"{name}_low"], found[f"{name}_high"]) == wilson(right, n)
                assert found[f"{prefix}{'n_attack' if attack == 'autoattack' else 'n'}_{group}"] == n
    for name in found:
        assert describe(name, ("standard", "mine")).only == "the profile has `data.imbalance`"
        if "n_" not in name:
            assert describe(f"ema_{name}", ("standard", "mine")).unit in ("fraction", "count")


def test_both_groups_add_up_to_the_accuracy_of_all() -> None:
    """On a network's own verdicts; where no image was attacked by the ensemble, or none is of a group, there is no accuracy."""
    model, x = Curved().eval(), images(40)
    y = labelled(model, x, 8)
    asked = settings(0.012, 12)
    asked = asked.model_copy(update={"protocols": {"standard": settings(0.012, 0).standard, "quick": asked.protocols["quick"]}})
    whole = audit(model, x, y, asked, with_checks=False)
    counts = torch.bincount(y, minlength=10).tolist()
    found = flat_results(accuracies(whole.table, head_and_tail(counts), {"standard": "pgd20", "quick": "pgd20"}))
    for name in ("clean", "pgd20", "quick_clean", "quick_pgd20", "quick_autoattack"):
        assert found[f"{name}_head_correct"] + found[f"{name}_tail_correct"] == whole.metrics[f"{name}_correct"]
    assert found["n_head"] + found["n_tail"] == 40
    assert found["quick_n_attack_head"] + found["quick_n_attack_tail"] == 12
    assert not any(name.startswith("autoattack") for name in found)
    without = flat_results(accuracies(whole.table, {"head": [11], "tail": list(range(10))}, {"standard": "pgd20"}))
    assert "clean_head_acc" not in without
    assert without["clean_tail_acc"] == pytest.approx(whole.metrics["clean_acc"])
