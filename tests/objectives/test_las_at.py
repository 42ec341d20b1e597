"""LAS-AT: its targets, budgets of each image, equal chances without learning, and what the policy learns from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.jobs import named
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import las_at as objective
from ebjdat.objectives import recipes
from ebjdat.objectives.las_at import Policy, by_policy, las_at, policy
from ebjdat.objectives.sampling import SamplingState, adversarial, neighbours
from ebjdat.objectives.terms import Terms
from ebjdat.samplers.budgets import Budget
from ebjdat.samplers.pgd import cross_entropy_score, projected_gradient
from ebjdat.settings import TrainingSettings, WeightSettings
from tests.networks import Curved, images
from tests.training.conftest import METHODS, changed, spy

CPU, BOUNDS = torch.device("cpu"), (-1.0, 1.0)
SMALL = {"unit": 1 / 255, "eps": [3, 15], "iterations": [3, 14], "step": [1, 5]}


def settings(**changes: Any) -> TrainingSettings:
    attack = {"eps": 8 / 255, "steps": 10, "step_size": 2 / 255}
    return changed(METHODS.training_settings("las_at"), **{"adversary": attack, "policy": SMALL, **changes})


def batch_of(x: Tensor) -> Batch:
    return Batch(x, x, torch.arange(len(x)) % 10)


@pytest.fixture
def batch() -> Batch:
    return batch_of(torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 0.5 - 0.25)


def fixed(eps: int, iterations: int, step: int) -> dict[str, Any]:
    return {**SMALL, "choose": "uniform", "eps": [eps] * 2, "iterations": [iterations] * 2, "step": [step] * 2}


def test_single_choices_are_pgd_at_with_smoothed_labels(network: WideResNet, batch: Batch, rng: torch.Generator) -> None:
    """{8}, {10}, {2} of 1/255 from the image itself: PGD-AT's neighbours, and its loss with 0.7 on the label. 1e-6: fp32."""
    spec = settings(policy=fixed(8, 10, 2), adversary={"start": "clean"})
    own = policy(network, spec, 0)
    moved = by_policy(network, batch, SamplingState(spec, own=own), rng)
    usual = adversarial(
        network, batch, SamplingState(settings(adversary={"eps": 8 / 255, "steps": 10, "step_size": 2 / 255, "start": "clean"})), rng
    )
    assert (moved - batch.x).abs().max() == pytest.approx(16 / 255, abs=1e-6)
    assert torch.allclose(moved, usual, atol=1e-6)
    network.eval()
    loss = las_at(network, batch, {"policy": moved}, WeightSettings()).loss
    expected = F.cross_entropy(network(usual), batch.y, label_smoothing=0.3 * 10 / 9)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    plain = recipes.pgd_at(network, batch, {"adversarial": usual}, WeightSettings())
    assert float(plain.loss) != pytest.approx(float(loss), abs=1e-3)


def test_each_image_is_attacked_as_if_it_were_alone(rng: torch.Generator) -> None:
    """Radius, steps and step size of its own; float64, so that no sign turns: 1e-6 is the budget's own fp32."""
    model, spec = Curved().double(), settings(adversary={"start": "clean"})
    given = batch_of(images().double())
    own = policy(WideResNet(METHODS.model, 1, 10), settings(policy={**SMALL, "choose": "uniform"}), 0)
    moved = by_policy(model, given, SamplingState(spec, own=own), rng)  # type: ignore[arg-type]
    (chosen,) = own.chosen
    for i, (eps, steps, step) in enumerate(zip(*(values[at] for values, at in zip(own.values, chosen.T, strict=True)), strict=True)):
        x = given.x[i : i + 1]
        score = cross_entropy_score(model, x, given.y[i : i + 1])
        numbers = {"eps": 2 * int(eps) / 255, "step_size": 2 * int(step) / 255, "steps": int(steps)}
        alone = projected_gradient(score, x, **numbers, norm="Linf", bounds=BOUNDS, start=x)  # type: ignore[arg-type]
        assert torch.allclose(moved[i : i + 1], alone, atol=1e-6)
    assert len({tuple(row.tolist()) for row in chosen}) > len(chosen) / 2


def test_starts_are_in_the_usual_ball_whatever_the_radius(network: WideResNet, batch: Batch, rng: torch.Generator) -> None:
    """One step of 1 within 15, from a uniform start within 8: up to 9 of 1/255, and within 3 where that is the radius."""
    for eps, reach in ((15, 9), (3, 3)):
        spec = settings(policy=fixed(eps, 1, 1))
        moved = by_policy(network, batch, SamplingState(spec, own=policy(network, spec, 0)), rng)
        assert reach - 0.1 < float((moved - batch.x).abs().max()) * 255 / 2 <= reach + 1e-3


@pytest.mark.parametrize("choose", ["learned", "uniform"])
def test_at_first_and_without_learning_every_choice_has_the_same_chance(choose: str, network: WideResNet) -> None:
    """Chi-square of 6,400 draws of each of the three, and of radius and step size together; 1e-3 would come once in a thousand seeds."""
    own = policy(network, settings(policy={**SMALL, "choose": choose}), 0)
    x = torch.rand(6400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    budget = own.budget(x, Budget(0.1, 0.1, 0.1, 1), torch.Generator().manual_seed(1))
    (chosen,) = own.chosen
    for column, n in zip(chosen.T, (13, 12, 5), strict=True):
        assert chisquare(torch.bincount(column, minlength=n).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(chosen[:, 0] * 5 + chosen[:, 2], minlength=65).numpy()).pvalue > 1e-3
    assert isinstance(budget.eps, Tensor)
    assert budget.own_steps is not None
    assert sorted(Counter(budget.own_steps.flatten().tolist())) == list(range(3, 15))
    assert (float(budget.eps.min()), float(budget.eps.max())) == pytest.approx((6 / 255, 30 / 255))  # of [-1, 1] pixels
    assert budget.steps == 14


class Constant(nn.Module):
    """The first class, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.zeros(len(x), dtype=torch.int64), 10) * (3.0 + 0 * x.flatten(1).sum(1, keepdim=True)) + self.weight


def step(own: Policy, model: nn.Module, batch: Batch, index: int, ce: float) -> dict[str, float]:
    terms = Terms(torch.zeros(()), logged={"ce_robust": torch.tensor(ce)})
    own.budget(batch.x, Budget(0.1, 0.1, 0.1, 1), torch.Generator().manual_seed(index))
    logged = own.after(model, batch, {}, terms, index, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return {name: float(value) for name, value in logged.items()}


def test_the_reward_and_when_it_is_measured(network: WideResNet, batch: Batch) -> None:
    """min(CE, 10) + (4 + 2) x 7/64 for a constant network, which classifies 7 of 64 right whatever the attack."""
    own = policy(network, settings(policy={**SMALL, "every": 2}), 0)
    before = [p.detach().clone() for p in own.network.parameters()]  # type: ignore[union-attr]
    assert step(own, Constant(), batch, 0, 2.5)["policy_reward"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, own.network.parameters(), strict=True))  # type: ignore[union-attr]
    logged = step(own, Constant(), batch, 1, 2.5)
    assert logged["policy_reward"] == pytest.approx(2.5 + 6 * 7 / 64)
    assert any(not torch.equal(a, b) for a, b in zip(before, own.network.parameters(), strict=True))  # type: ignore[union-attr]
    assert step(own, Constant(), batch, 3, 20.0)["policy_reward"] == pytest.approx(10 + 6 * 7 / 64)
    assert 3 <= logged["policy_eps"] <= 15
    assert 1 <= logged["policy_step"] <= 5


def test_the_rewards_attack_counts_every_restart(network: WideResNet, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network under attack: the robust accuracy is that of images that no restart moves to another class."""
    network.eval()
    with torch.no_grad():
        labelled = Batch(batch.x, batch.x, network(batch.x).argmax(1))
    own = policy(network, settings(), 0)
    own.budget(batch.x, Budget(0.1, 0.1, 0.1, 1), torch.Generator())
    attacks = spy(monkeypatch, objective, "neighbours", lambda *given: given[3].steps)
    robust, clean = own.accuracies(network, labelled, torch.Generator().manual_seed(0))
    assert float(clean) == 1
    assert attacks == [10, 10]
    assert own.check.step == pytest.approx(own.check.eps / 4)
    noise, right = torch.Generator().manual_seed(0), torch.ones(64, dtype=torch.bool)
    for _ in range(2):
        with torch.no_grad():
            right &= network(neighbours(network, batch.x, labelled.y, own.check, noise)).argmax(1) == labelled.y
    assert float(robust) == float(right.float().mean())


def test_reinforce_is_a_step_up_the_reward_times_the_log_chance(network: WideResNet, batch: Batch) -> None:
    """Of the head's bias: lr R mean (chosen - chance); and no longer than lr where the gradient is clipped."""
    own = policy(network, settings(policy={**SMALL, "lr": 0.5}), 0)
    assert own.network is not None
    own.budget(batch.x, Budget(0.1, 0.1, 0.1, 1), torch.Generator().manual_seed(0))
    (chosen,) = own.chosen
    sizes = (13, 12, 5)
    expected = torch.cat([F.one_hot(at, n).float().mean(0) - 1 / n for at, n in zip(chosen.T, sizes, strict=True)])
    before = [p.detach().clone() for p in own.network.parameters()]
    own.reward = torch.tensor(0.01)
    own.reinforce(own.optimizer, batch.x, chosen)  # type: ignore[arg-type]
    assert torch.allclose(own.network.head.bias, 0.5 * 0.01 * expected, atol=1e-8)
    own.reward = torch.tensor(1e6)
    after = [p.detach().clone() for p in own.network.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    own.reinforce(own.optimizer, batch.x, chosen)  # type: ignore[arg-type]
    moved = torch.cat([(p - old).flatten() for p, old in zip(own.network.parameters(), after, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_the_policy_is_another_network_for_another_seed_and_counts_as_code(network: WideResNet) -> None:
    own, same, other = (policy(network, settings(), seed).network for seed in (0, 0, 1))
    assert torch.equal(own.stem.weight, same.stem.weight)  # type: ignore[union-attr]
    assert not torch.equal(own.stem.weight, other.stem.weight)  # type: ignore[union-attr]
    assert not torch.equal(own.stem.weight, network.stem.weight)  # type: ignore[union-attr]
    targets = {entry.target for entry in named({"method": "las_at", "training": settings().model_dump()})}
    assert {"ebjdat.objectives.las_at:policy", "ebjdat.objectives.las_at:by_policy", "ebjdat.samplers.pgd:cross_entropy_score"} <= targets
