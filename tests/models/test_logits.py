"""Logits as classes."""

from __future__ import annotations

import math

import torch

from ebjdat.models.logits import NO_CLASS, predicted


def test_a_row_that_is_not_finite_is_no_class() -> None:
    rows = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [math.nan, 5.0], [math.inf, 0.0], [3.0, -math.inf], [3.0, 0.0]])
    assert predicted(rows).tolist() == [1, NO_CLASS, NO_CLASS, NO_CLASS, NO_CLASS, 0]
