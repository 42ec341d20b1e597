"""Budgets of the training's adversary: identities, the published table, and what each control keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.samplers import budgets
from ebjdat.samplers.budgets import Budget, Scale
from ebjdat.settings import AdversarySettings, BudgetSettings, ImbalanceSettings

EPOCHS = 100
SPEC = AdversarySettings.model_validate({"eps": "8/255", "step_size": "2/255"})


def counts(ratio: float, largest: int = 5000) -> Tensor:
    return torch.tensor(ImbalanceSettings(ratio=ratio, largest=largest).drawn(10), dtype=torch.float64)


def factors(name: str, of: Tensor, epoch: int = EPOCHS, **settings: float) -> Tensor:
    """Of each class, when the warm-up is over, unless an epoch (from 0) is given."""
    spec = BudgetSettings(name=name, **settings)
    scale: Scale = registry.load(registry.BUDGETS, name)(spec, of, epoch, EPOCHS)
    return scale.by_class


@pytest.mark.parametrize("ratio", [10, 50, 100])
def test_the_mean_radius_over_images_is_eps(ratio: float) -> None:
    """sum_c (n_c / N) eps_c = eps, to the rounding of double precision."""
    for share in (0.3, 1.0):
        of = counts(ratio)
        mean = sum(float(n) * float(f) for n, f in zip(of, factors("robust_lt", of, by_class=share), strict=True)) / float(of.sum())
        assert mean == pytest.approx(1.0, abs=1e-12)


def test_the_published_radii_of_cifar10_lt() -> None:
    """In 1/255 at ratio 50, by class; given with two digits, so within 0.005."""
    published = [5.60, 8.03, 9.03, 9.80, 10.45, 11.03, 11.54, 12.02, 12.46, 12.88]
    assert (8 * factors("robust_lt", counts(50))).tolist() == pytest.approx(published, abs=0.0051)


def test_radii_by_the_slow_formula() -> None:
    """Of a split in which neither the order of classes nor their sizes are regular."""
    of = torch.tensor([40.0, 7.0, 400.0, 40.0, 1.0], dtype=torch.float64)
    rarity = [math.sqrt(math.log(400 / n)) for n in of.tolist()]
    mean = sum(n / 488 * s for n, s in zip(of.tolist(), rarity, strict=True))
    expected = [(1 - 0.4) + 0.4 / mean * s for s in rarity]
    assert factors("robust_lt", of, by_class=0.4).tolist() == pytest.approx(expected, abs=1e-12)
    assert factors("robust_lt", of, by_class=0.4).argmax() == 4  # the class of one image has the largest


@pytest.mark.parametrize("name", ["robust_lt", "robust_lt_permuted"])
def test_without_a_share_by_class_or_with_equal_classes_every_class_has_eps(name: str) -> None:
    assert factors(name, counts(50), by_class=0.0).tolist() == [1.0] * 10
    for largest in (5000, 129):
        assert factors(name, counts(1, largest), by_class=0.3).tolist() == [1.0] * 10


@pytest.mark.parametrize("name", ["ramp", "robust_lt", "robust_lt_permuted"])
def test_budgets_grow_from_nothing_in_the_first_epoch(name: str) -> None:
    """min((epoch - 1) / (b epochs), 1), epochs from 1; without a warm-up, all at once."""
    of, whole = counts(10), factors(name, counts(10))
    for epoch in (1, 2, 41, 80, 81, 100):
        expected = whole * min((epoch - 1) / (0.8 * EPOCHS), 1.0)
        assert torch.allclose(factors(name, of, epoch - 1), expected, rtol=0, atol=1e-15)
    assert factors(name, of, 0).abs().max() == 0
    assert torch.equal(factors(name, of, 0, warmup=0.0), whole)
    assert torch.equal(factors(name, of, 50, warmup=0.5), whole)
    nothing = registry.load(registry.BUDGETS, name)(BudgetSettings(name=name), of, 0, 0)
    assert torch.equal(nothing.by_class, whole)  # of no epochs


def test_the_permuted_control_has_the_same_radii_of_other_classes() -> None:
    """The same multiset; no class keeps its own, and the smaller half has less than it had. Also if labels are in another order."""
    for order in (torch.arange(10), torch.randperm(10, generator=torch.Generator().manual_seed(0))):
        of = counts(50)[order]
        own, permuted = factors("robust_lt", of), factors("robust_lt_permuted", of)
        assert own.sort().values.tolist() == permuted.sort().values.tolist()
        assert (own != permuted).all()
        small = of.argsort()[:5]
        assert (permuted[small] < own[small]).all()
    balanced = counts(1)
    assert torch.equal(factors("robust_lt_permuted", balanced), factors("robust_lt", balanced))


def test_a_ramp_is_the_same_for_every_class_and_for_the_start() -> None:
    scale = budgets.ramp(BudgetSettings(name="ramp", warmup=0.5), counts(50), 10, EPOCHS)
    assert scale.by_class.tolist() == [0.2] * 10
    assert scale.start == 0.2
    assert budgets.robust_lt(BudgetSettings(name="robust_lt"), counts(50), 10, EPOCHS).start == 1.0  # in the ball of eps itself


def test_a_uniform_budget_is_no_scale() -> None:
    assert budgets.uniform(BudgetSettings(), counts(50), 0, EPOCHS) is None


def test_steps_shrink_and_grow_with_the_radius_and_starts_do_not() -> None:
    """Internal range: twice as far as in [0, 1] pixels. step_c = step eps_c / eps."""
    usual = Budget.usual(SPEC)
    assert (usual.eps, usual.step, usual.start, usual.steps) == (16 / 255, 4 / 255, 16 / 255, 10)
    y = torch.tensor([9, 0, 9, 3])
    budget = budgets.robust_lt(BudgetSettings(name="robust_lt"), counts(50), EPOCHS, EPOCHS).on(torch.device("cpu")).of(usual, y)
    assert isinstance(budget.eps, Tensor)
    assert isinstance(budget.step, Tensor)
    assert budget.eps.shape == budget.step.shape == (4, 1, 1, 1)
    assert (budget.eps.flatten() * 255 / 2).tolist() == pytest.approx([12.88, 5.6, 12.88, 9.8], abs=0.006)
    assert torch.allclose(budget.step / budget.eps, torch.tensor(2 / 8))
    assert (budget.start, budget.steps, budget.own_steps) == (usual.start, 10, None)
    released = Budget.usual(SPEC.model_copy(update={"range": "internal", "start_ratio": 0.5, "step_ratio": 0.1}))
    assert (released.eps, released.step, released.start) == (8 / 255, pytest.approx(0.8 / 255), 4 / 255)
