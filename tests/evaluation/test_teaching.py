"""What a teacher says of sets of images, against a slow loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebjdat.evaluation.teaching import Learned, certainty, learned, sets_of
from ebjdat.settings import load
from tests.conftest import ROOT, Linear

STANDARD = load(ROOT / "params/digits.yaml").evaluation.attack.standard


class Turned(nn.Module):
    """Another network's logits, each given to the next class: wrong wherever that is right."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).roll(1, 1)  # type: ignore[no-any-return]


def test_an_image_is_learned_by_the_networks_that_are_right_under_pgd() -> None:
    """Of linear networks, one of which is wrong everywhere."""
    model, x = Linear(), 0.5 + 0.2 * (torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    y = model(x).argmax(1)
    eps = float(model.robust_radius(x, y).detach().median())
    protocol = STANDARD.model_copy(update={"eps": eps, "pgd": STANDARD.pgd.model_copy(update={"step_size": eps / 4, "steps": 20})})
    one, both = learned([model], x, y, protocol, 0, 16), learned([model, Turned(model)], x, y, protocol, 0, 16)
    assert (one.networks, both.networks) == (1, 2)
    assert 8 < one.robust.sum() < 32
    assert (one.robust <= 1).all()
    assert (both.robust == one.robust).all()
    expected = [math.log(sum(math.exp(z) for z in row)) - row[k] for row, k in zip(model(x).tolist(), y.tolist(), strict=True)]
    assert one.cross_entropy == pytest.approx(expected, rel=1e-3, abs=1e-5)
    sets = sets_of(both, 0)
    assert not sets["learned"].any()
    assert (sets["unlearned"] == (one.robust == 0)).all()


def test_controls_are_as_large_and_differ() -> None:
    robust = np.array([0, 3, 0, 1, 3, 3, 2, 0, 3, 3])
    losses = np.array([0.1, 0.9, 0.2, 0.3, 0.8, 0.7, 0.1, 0.05, 0.1, 0.1])
    sets = sets_of(Learned(robust, losses, 3), seed=1)
    assert np.flatnonzero(sets["unlearned"]).tolist() == [0, 2, 7]
    assert np.flatnonzero(sets["learned"]).tolist() == [1, 4, 5, 8, 9]
    assert np.flatnonzero(sets["hardest"]).tolist() == [1, 4, 5]
    choices = [sets_of(Learned(robust, losses, 3), seed=s)["random"] for s in (1, 1, *range(2, 6))]
    assert all(choice.sum() == 3 for choice in choices)
    assert (choices[0] == choices[1]).all()
    assert any((choices[0] != choice).any() for choice in choices)


def test_entropy_and_confidence_by_a_slow_loop_and_of_known_teachers() -> None:
    logits = np.random.default_rng(0).normal(size=(12, 5)) * 3
    chosen = np.arange(12) % 3 == 0
    found = certainty(logits, {"learned": chosen, "unlearned": np.zeros(12, bool)})
    entropies, confidences = [], []
    for row in logits[chosen]:
        p = [math.exp(z) / sum(math.exp(v) for v in row) for z in row]
        entropies.append(-sum(value * math.log(value) for value in p))
        confidences.append(max(p))
    assert found["teacher_entropy_learned"] == pytest.approx(np.mean(entropies))
    assert found["teacher_entropy_learned_se"] == pytest.approx(np.std(entropies, ddof=1) / 2)
    assert found["teacher_confidence_learned"] == pytest.approx(np.mean(confidences))
    assert found["n_learned"] == 4
    assert (found["teacher_entropy_unlearned"], found["teacher_confidence_unlearned"], found["n_unlearned"]) == (None, None, 0)
    flat, sure = (certainty(scale * np.eye(10), {"a": np.ones(10, bool)}) for scale in (0.0, 500.0))
    assert flat["teacher_entropy_a"] == pytest.approx(math.log(10))
    assert (sure["teacher_entropy_a"], sure["teacher_confidence_a"]) == (pytest.approx(0, abs=1e-12), 1)
