"""Updates against closed forms."""

from __future__ import annotations

import copy

import pytest
import torch

from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.terms import Terms
from ebjdat.settings import OptimizerSettings, UpdateSettings
from ebjdat.training import updates


def test_plain_update_is_one_sgd_step_by_hand() -> None:
    """Two steps of SGD with momentum and weight decay on a quadratic, written out."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = updates.sgd([w], OptimizerSettings(lr=0.1, momentum=0.9, weight_decay=0.5))
    expected, velocity = 3.0, 0.0
    for _ in range(2):
        terms = updates.plain(torch.nn.Module(), optimizer, [lambda: Terms((w**2).sum())], UpdateSettings())
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
    terms = updates.sam(torch.nn.Module(), optimizer, [lambda: Terms(w @ a @ w / 2)], UpdateSettings(rho=0.5, adaptive=adaptive))
    g = a @ start
    e = 0.5 * (start**2 * g / (start.abs() * g).norm() if adaptive else g / g.norm())
    assert torch.allclose(w.detach(), start - 0.1 * a @ (start + e), atol=1e-12)
    assert float(terms.loss) == pytest.approx(float(start @ a @ start / 2))  # the loss at w, not at w + e


def test_sam_measures_its_radius_over_all_weights_together() -> None:
    """Two parameter tensors, as one vector in the closed form: e = rho g / |g| over both."""
    one, two = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, -2.0], [3.0]))
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    updates.sam(torch.nn.Module(), optimizer, [lambda: Terms((one**2).sum() + 2 * (two**2).sum())], UpdateSettings(rho=0.5, adaptive=False))
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
    updates.sam(network, torch.optim.SGD(network.parameters(), lr=0.1), [closure], UpdateSettings(rho=1.0))
    assert len(calls) == 2
    assert not torch.equal(calls[0]["stem.weight"], calls[1]["stem.weight"])
    ours, theirs = network.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "running" in k)
    assert any(not torch.equal(ours[k], torch.zeros_like(ours[k])) for k in ours if "running_mean" in k)
