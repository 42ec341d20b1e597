"""Losses for long-tailed splits, against cross-entropies by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ebjdat.data.batches import Batch
from ebjdat.objectives import longtail, recipes
from ebjdat.settings import WeightSettings

LOGITS = torch.tensor([[1.0, 3.0, -2.0], [0.5, -0.5, 2.0]])
BATCH = Batch(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1, 0]))


class Shift(nn.Module):
    """Logits are the "image" and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def test_at_bsl_by_hand() -> None:
    """-z_y - log n_y + log sum_k n_k exp(z_k), whatever the counts' common factor. float32."""
    counts = [50.0, 5.0, 1.0]
    rows, y = LOGITS.tolist(), BATCH.y.tolist()
    expected = sum(
        -z[k] - math.log(counts[k]) + math.log(sum(n * math.exp(v) for n, v in zip(counts, z, strict=True)))
        for z, k in zip(rows, y, strict=True)
    )
    for factor in (1.0, 1 / 50):
        samples = {"adversarial": LOGITS, "log_counts": (torch.tensor(counts) * factor).log().expand(2, -1)}
        terms = longtail.at_bsl(Shift(), BATCH, samples, WeightSettings())
        assert float(terms.loss) == pytest.approx(expected / 2, abs=1e-6)
        assert float(terms.scalars()["ce_robust"]) == pytest.approx(float(nn.functional.cross_entropy(LOGITS, BATCH.y)), abs=1e-6)


def test_a_rare_class_must_win_by_more() -> None:
    """The gradient that raises the logit of a rare class is larger, and that of a frequent one smaller, than plain cross-entropy's."""
    network, samples = Shift(), {"adversarial": LOGITS * 0, "log_counts": torch.tensor([8.0, 2.0, 1.0]).log().expand(2, -1)}
    for y, larger in ((0, False), (2, True)):
        batch = Batch(BATCH.x, BATCH.x, torch.full((2,), y))
        balanced, plain = (
            torch.autograd.grad(recipe(network, batch, samples, WeightSettings()).loss, network.by)[0][y].neg()
            for recipe in (longtail.at_bsl, recipes.pgd_at)
        )
        assert (balanced > plain) == larger


def test_equal_counts_are_pgd_at_bit_for_bit() -> None:
    samples = {"adversarial": LOGITS, "log_counts": torch.zeros(2, 3)}
    both = [recipe(Shift(), BATCH, samples, WeightSettings()).scalars() for recipe in (longtail.at_bsl, recipes.pgd_at)]
    assert all(torch.equal(both[0][name], value) for name, value in both[1].items())
