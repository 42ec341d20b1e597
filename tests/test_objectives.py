"""Losses against values computed by hand on fixed logits, sign by sign."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ebjdat.data.batches import Batch, DeviceData, epoch_batches
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import recipes
from ebjdat.objectives.draws import DrawState, adversarial, negatives
from ebjdat.params import TrainingSettings, WeightSettings
from ebjdat.pixels import internal_distance
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.starts import StartPool


class Table(nn.Module):
    """Looks logits up: an "image" is the number of its row. So every logit of a loss can be chosen."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x.long()]


CLEAN, DENSITY, NEGATIVE, ADVERSARIAL = [1.0, 3.0], [0.5, 2.0], [2.0, 2.0], [1.5, 0.5]
Y = 1


def lse(row: list[float]) -> float:
    return math.log(sum(map(math.exp, row)))


def ce(row: list[float]) -> float:
    return lse(row) - row[Y]


@pytest.fixture
def table() -> Table:
    return Table([CLEAN, DENSITY, NEGATIVE, ADVERSARIAL])


BATCH = Batch(x=torch.tensor([0]), x_density=torch.tensor([1]), y=torch.tensor([Y]))
DRAWS = {"negatives": torch.tensor([2]), "adversarial": torch.tensor([3])}


def loss_and_gradient(table: Table, recipe: object, weights: WeightSettings) -> tuple[float, Tensor]:
    terms = recipe(table, BATCH, DRAWS, weights)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(terms["loss"], table.rows)
    assert not any(value.requires_grad for name, value in terms.items() if name != "loss")
    return float(terms["loss"].detach()), gradient


def test_classifier_and_pgd_at_are_cross_entropies(table: Table) -> None:
    clean, gradient = loss_and_gradient(table, recipes.classifier, WeightSettings())
    assert clean == pytest.approx(ce(CLEAN), abs=1e-6)
    assert gradient[1:].abs().sum() == 0
    robust, gradient = loss_and_gradient(table, recipes.pgd_at, WeightSettings())
    assert robust == pytest.approx(ce(ADVERSARIAL), abs=1e-6)
    assert gradient[:3].abs().sum() == 0


def test_jem_by_hand(table: Table) -> None:
    """E(x+) - E(x-) + CE, with E = -logsumexp; a step lowers the energy of data and raises that of chains."""
    for w1, w3 in ((1.0, 1.0), (0.5, 2.0), (0.0, 1.0)):
        loss, _ = loss_and_gradient(table, recipes.jem, WeightSettings(w1=w1, w3=w3))
        assert loss == pytest.approx(w1 * (-lse(DENSITY) + lse(NEGATIVE)) + w3 * ce(CLEAN), abs=1e-6)
    _, gradient = loss_and_gradient(table, recipes.jem, WeightSettings(w3=0))
    assert (gradient[1] < 0).all()  # a descent step raises these logits: lower energy of x+
    assert (gradient[2] > 0).all()  # lowers these: higher energy of x-
    assert torch.allclose(gradient[1], -torch.tensor(DENSITY).softmax(0))
    assert torch.allclose(gradient[2], torch.tensor(NEGATIVE).softmax(0))


def test_without_noise_the_clean_logits_serve_both_terms(table: Table) -> None:
    x = torch.tensor([0])
    terms = recipes.jem(table, Batch(x=x, x_density=x, y=torch.tensor([Y])), DRAWS, WeightSettings())
    assert float(terms["loss"].detach()) == pytest.approx(-lse(CLEAN) + lse(NEGATIVE) + ce(CLEAN), abs=1e-6)


@pytest.mark.parametrize(("w1", "w2", "w3"), [(1, 1, 1), (0, 0, 1), (0, 1, 1), (1, 0.5, 1)])
def test_eb_jdat_by_hand(table: Table, w1: float, w2: float, w3: float) -> None:
    """The ablation rows of the paper."""
    loss, _ = loss_and_gradient(table, recipes.eb_jdat, WeightSettings(w1=w1, w2=w2, w3=w3))
    h1 = -lse(DENSITY) + lse(NEGATIVE)
    h2 = -lse(ADVERSARIAL) + lse(CLEAN)
    assert loss == pytest.approx(w1 * h1 + w2 * h2 + w3 * (ce(CLEAN) + ce(ADVERSARIAL)), abs=1e-6)


def test_alignment_pulls_adversarial_energy_down_to_the_clean_ones(table: Table) -> None:
    _, gradient = loss_and_gradient(table, recipes.eb_jdat, WeightSettings(w1=0, w2=1, w3=0))
    assert (gradient[3] < 0).all()  # a step raises the logits of x~: lower E(x~)
    assert (gradient[0] > 0).all()  # and lowers those of x
    assert gradient[1:3].abs().sum() == 0


@pytest.fixture
def state(digits: Prepared, train_data: DeviceData, settings: TrainingSettings) -> DrawState:
    pool = StartPool.of(train_data, torch.from_numpy(digits.class_mean))
    rng = torch.Generator().manual_seed(0)
    start = DrawState(settings, pool, None).start
    return DrawState(settings, pool, ReplayBuffer.fresh(200, 10, start, torch.device("cpu"), rng))


def test_draws_leave_the_network_alone_and_respect_the_budget(
    state: DrawState, network: WideResNet, train_data: DeviceData, settings: TrainingSettings, rng: torch.Generator
) -> None:
    batch = next(epoch_batches(train_data, 64, settings.augment, 0, 0))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    moved = adversarial(network, batch, state, rng)
    eps = internal_distance(settings.adversary.eps)
    assert eps == 2 * settings.adversary.eps  # [0, 1] budget in the range [-1, 1]
    assert 0.5 * eps < (moved - batch.x).abs().max() <= eps + 1e-6
    assert moved.abs().max() <= 1
    assert state.buffer is not None
    old = state.buffer.images.clone()
    x = negatives(network, batch, state, rng)
    changed = (state.buffer.images != old).flatten(1).any(1)
    assert changed.sum() == 64
    assert sorted(row.sum().item() for row in x) == pytest.approx(sorted(row.sum().item() for row in state.buffer.images[changed]))
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "num_batches" not in k)
    assert all(p.grad is None for p in network.parameters())
