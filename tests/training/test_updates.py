"""Updates against closed forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.terms import Terms
from ebjdat.settings import ModelSettings, OptimizerSettings, UpdateSettings
from ebjdat.training import updates
from ebjdat.training.updates import When

WHEN = When(0, torch.Generator())


def test_plain_update_is_one_sgd_step_by_hand() -> None:
    """Two steps of SGD with momentum and weight decay on a quadratic, written out."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = updates.sgd([w], OptimizerSettings(lr=0.1, momentum=0.9, weight_decay=0.5))
    expected, velocity = 3.0, 0.0
    for _ in range(2):
        terms = updates.plain(torch.nn.Module(), optimizer, [lambda: Terms((w**2).sum())], UpdateSettings(), WHEN)
        assert float(terms.loss) == pytest.approx(expected**2)
        gradient = 2 * expected + 0.5 * expected
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * velocity
        assert w.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_on_a_quadratic_has_a_closed_form(adaptive: bool) -> None:
    """f = w'Aw/2: e = rho g/|g| or rho w^2 g/||w| g| with g = Aw, and the step is -lr A(w + e). float64."""
    a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    start = torch.tensor([0.7, -1.3], dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=0.1)
    terms = updates.sam(torch.nn.Module(), optimizer, [lambda: Terms(w @ a @ w / 2)], UpdateSettings(rho=0.5, adaptive=adaptive), WHEN)
    g = a @ start
    e = 0.5 * (start**2 * g / (start.abs() * g).norm() if adaptive else g / g.norm())
    assert torch.allclose(w.detach(), start - 0.1 * a @ (start + e), atol=1e-12)
    assert float(terms.loss) == pytest.approx(float(start @ a @ start / 2))  # the loss at w, not at w + e


def test_sam_measures_its_radius_over_all_weights_together() -> None:
    """Two parameter tensors, as one vector in the closed form: e = rho g / |g| over both."""
    one, two = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, -2.0], [3.0]))
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    updates.sam(
        torch.nn.Module(), optimizer, [lambda: Terms((one**2).sum() + 2 * (two**2).sum())], UpdateSettings(rho=0.5, adaptive=False), WHEN
    )
    start, curvature = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 2.0, 4.0], dtype=torch.float64)
    g = curvature * start
    expected = start - 0.1 * curvature * (start + 0.5 * g / g.norm())
    assert torch.allclose(torch.cat([one, two]).detach(), expected, atol=1e-12)


def test_adam_is_torchs_with_the_settings_betas() -> None:
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    first = updates.adam([ours], OptimizerSettings(name="adam", lr=0.1, momentum=0.5, weight_decay=0.1))
    second = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.999), weight_decay=0.1)
    for _ in range(3):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_sam_evaluates_one_loss_twice_and_keeps_running_statistics_of_the_first(network: WideResNet) -> None:
    """After SAM, batch norm's running statistics are those that one plain evaluation leaves."""
    x = torch.rand(16, 1, 8, 8)
    plain, calls = copy.deepcopy(network), []
    plain.train()
    plain(x)

    def closure() -> Terms:
        calls.append({k: v.clone() for k, v in network.state_dict().items() if k.endswith("weight")})
        return Terms(network(x).square().mean())

    network.train()
    updates.sam(network, torch.optim.SGD(network.parameters(), lr=0.1), [closure], UpdateSettings(rho=1.0), WHEN)
    assert len(calls) == 2
    assert not torch.equal(calls[0]["stem.weight"], calls[1]["stem.weight"])
    ours, theirs = network.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "running" in k)
    assert any(not torch.equal(ours[k], torch.zeros_like(ours[k])) for k in ours if "running_mean" in k)


def test_awp_perturbs_each_layer_by_its_own_length() -> None:
    """f = a w^2 / 2 + b sum(w): v = rho |w| g / |g| with g = a w + b; the bias b does not move. float64."""
    a, start = torch.tensor([[3.0, 1.0], [2.0, 4.0]]).double(), torch.tensor([[0.7, -1.3], [0.2, 0.9]]).double()
    w, b = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.tensor([0.5]).double())
    optimizer = torch.optim.SGD([w, b], lr=0.1)
    terms = updates.awp(torch.nn.Module(), optimizer, [lambda: Terms((a * w**2).sum() / 2 + (b * w).sum())], UpdateSettings(rho=0.3), WHEN)
    g = a * start + 0.5
    moved = start + 0.3 * start.norm() * g / g.norm()
    assert torch.allclose(w.detach(), start - 0.1 * (a * moved + 0.5), atol=1e-12)
    assert b.item() == pytest.approx(0.5 - 0.1 * float(moved.sum()), abs=1e-12)
    assert float(terms.loss) == pytest.approx(float((a * start**2).sum() / 2 + 0.5 * start.sum()))


@pytest.mark.parametrize("update", [updates.awp, updates.awp_random])
def test_both_perturbations_of_weights_are_as_long_and_only_one_climbs(update: Any, rng: torch.Generator) -> None:
    """|v_l| / |w_l| = rho in each layer of a network, biases and batch norm stay; awp's raises the loss."""
    model = WideResNet(ModelSettings(depth=10, width=1), 1, 10)
    x, y, seen = torch.rand(16, 1, 8, 8, generator=rng) * 2 - 1, torch.arange(16) % 10, []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure() -> Terms:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        seen.append((float(loss.detach()), {name: p.detach() - before[name] for name, p in model.named_parameters()}))
        return Terms(loss)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    update(model, optimizer, [closure], UpdateSettings(rho=0.01, after=2), When(1, rng))
    assert len(seen) == 1  # no perturbation in the first epochs
    update(model, optimizer, [closure], UpdateSettings(rho=0.01, after=2), When(2, rng))
    (low, _), (high, moved) = seen[-2:]
    for name, p in before.items():
        assert float(moved[name].norm()) == pytest.approx(0.01 * float(p.norm()) if p.ndim > 1 else 0.0, rel=1e-3, abs=1e-7), name
    assert (high > 1.01 * low) == (update is updates.awp)


def test_awp_without_a_radius_is_the_plain_update() -> None:
    ends = []
    for update, rho in ((updates.awp, 1e-30), (updates.plain, 1.0)):
        w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
        update(torch.nn.Module(), torch.optim.SGD([w], lr=0.1), [lambda w=w: Terms((w**4).sum())], UpdateSettings(rho=rho), WHEN)
        ends.append(w.detach())
    assert torch.equal(*ends)
