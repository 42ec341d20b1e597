"""Losses against values computed by hand on fixed logits, sign by sign."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ebjdat.data.batches import Batch
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import recipes
from ebjdat.settings import TrainingSettings, WeightSettings, load
from tests.conftest import ROOT


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


SAMPLES = {"negatives": torch.tensor([2]), "adversarial": torch.tensor([3])}


def loss_and_gradient(table: Table, recipe: object, weights: WeightSettings) -> tuple[float, Tensor]:
    terms = recipe(table, BATCH, SAMPLES, weights)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(terms.loss, table.rows)
    assert [name for name, value in terms.scalars().items() if value.requires_grad] == ["loss"]
    return float(terms.loss.detach()), gradient


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


def test_jem_gradient_is_the_exact_gradient_of_the_log_likelihood() -> None:
    """Six states, three classes: Z is a sum. With x- in exact proportion to p(x), h1's gradient is that of -mean log p(x).

    The logits are chosen so that p(x) = counts / 12; the exact gradient is autograd's through the summed log Z. float64,
    so 1e-12 is rounding.
    """
    counts = torch.tensor([1, 2, 3, 1, 4, 1], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    logits = logits - logits.logsumexp(1, keepdim=True) + counts.log()[:, None]
    table = Table(logits.tolist()).double()
    data = torch.tensor([0, 4, 4, 2, 5])
    log_p = table.rows.logsumexp(1) - table.rows.flatten().logsumexp(0)  # log p(x) = -E(x) - log Z
    assert torch.allclose(log_p.exp(), counts / counts.sum())
    (exact,) = torch.autograd.grad(-log_p[data].mean(), table.rows)

    batch = Batch(x=data, x_density=data.clone(), y=torch.zeros(5, dtype=torch.long))
    chains = {"negatives": torch.repeat_interleave(torch.arange(6), counts.long())}
    (ours,) = torch.autograd.grad(recipes.jem(table, batch, chains, WeightSettings(w3=0)).loss, table.rows)
    assert torch.allclose(ours, exact, atol=1e-12)
    assert exact.abs().max() > 0.05


def test_trades_by_hand(table: Table) -> None:
    """CE on clean images and beta KL(clean || adversarial), against torch.distributions; both sides get gradients."""
    p, q = (torch.distributions.Categorical(logits=torch.tensor(row)) for row in (CLEAN, ADVERSARIAL))
    expected = ce(CLEAN) + 6.0 * float(torch.distributions.kl_divergence(p, q))
    loss, gradient = loss_and_gradient(table, recipes.trades, WeightSettings(beta=6.0))
    assert loss == pytest.approx(expected, abs=1e-5)
    only_kl = gradient - loss_and_gradient(table, recipes.trades, WeightSettings(beta=0.0))[1]
    assert only_kl[0].abs().max() > 0.01
    assert only_kl[3].abs().max() > 0.01
    assert torch.allclose(only_kl[3], 6 * (q.probs - p.probs), atol=1e-5)


@pytest.mark.parametrize("recipe", [recipes.jem, recipes.eb_jdat])
def test_energy_penalty_by_hand(table: Table, recipe: object) -> None:
    """energy_l2 (E(x+)^2 + E(x-)^2), which pulls both energies towards 0."""
    bare, _ = loss_and_gradient(table, recipe, WeightSettings())
    loss, _ = loss_and_gradient(table, recipe, WeightSettings(energy_l2=0.3))
    assert loss - bare == pytest.approx(0.3 * (lse(DENSITY) ** 2 + lse(NEGATIVE) ** 2), abs=1e-5)


def test_without_noise_the_clean_logits_serve_both_terms(table: Table) -> None:
    x = torch.tensor([0])
    terms = recipes.jem(table, Batch(x=x, x_density=x, y=torch.tensor([Y])), SAMPLES, WeightSettings())
    assert float(terms.loss.detach()) == pytest.approx(-lse(CLEAN) + lse(NEGATIVE) + ce(CLEAN), abs=1e-6)


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


def form(name: str) -> tuple[TrainingSettings, WeightSettings]:
    profile = load(ROOT / "params/cifar10.yaml", [f"experiments.eb_jdat.form={name}"])
    settings = profile.training_settings("eb_jdat")
    return settings, settings.weights


def test_the_paper_form_moves_energies_as_the_paper_says(table: Table) -> None:
    """w = (1, 1, 1): a step raises E(x-), lowers E(x~); of E(x) and E(x+) each term's own direction is checked alone."""
    settings, weights = form("paper")
    assert (weights.w1, weights.w2, weights.w3) == (1, 1, 1)
    assert (settings.adversary.score, settings.adversary.project, settings.adversary.range) == ("energy", True, "unit")
    loss, gradient = loss_and_gradient(table, recipes.eb_jdat, weights)
    h1, h2 = -lse(DENSITY) + lse(NEGATIVE), -lse(ADVERSARIAL) + lse(CLEAN)
    assert loss == pytest.approx(h1 + h2 + ce(CLEAN) + ce(ADVERSARIAL), abs=1e-6)
    assert (gradient[1] < 0).all()  # E(x+) down
    assert (gradient[2] > 0).all()  # E(x-) up
    assert gradient[3].sum() < 0  # E(x~) down: cross-entropy leaves a constant shift of the logits alone
    assert gradient[0].sum() > 0  # E(x) up, towards E(x~)


def test_the_released_form_raises_adversarial_energies_with_a_tenth_of_the_weight(table: Table) -> None:
    """L += 0.1 (f(x~) - f(x+)), f the mean logsumexp, x+ the images of the p(x) term."""
    settings, weights = form("released")
    adversary = settings.adversary
    assert (adversary.score, adversary.project, adversary.range, adversary.mode) == ("released", False, "internal", "eval")
    loss, gradient = loss_and_gradient(table, recipes.eb_jdat, weights)
    h1, alignment = -lse(DENSITY) + lse(NEGATIVE), lse(ADVERSARIAL) - lse(DENSITY)
    assert loss == pytest.approx(h1 + 0.1 * alignment + ce(CLEAN) + ce(ADVERSARIAL), abs=1e-6)
    assert (gradient[2] > 0).all()  # E(x-) up, as in the paper's form
    assert gradient[3].sum() == pytest.approx(0.1, abs=1e-6)  # E(x~) up
    assert gradient[1].sum() == pytest.approx(-1.1, abs=1e-6)  # E(x+) down, twice
    assert gradient[0].sum() == pytest.approx(0, abs=1e-6)  # E(x) is left to cross-entropy


@pytest.mark.parametrize(("base", "w", "size"), [("jempp", (1, 0.1, 1), 8), ("jem", (0.45, 0.05, 0.45), 8), ("sadajem", (1, 0.1, 1), 4)])
@pytest.mark.parametrize("name", ["released", "released_ce"])
def test_the_released_loss_from_its_definition(
    name: str, base: str, w: tuple[float, float, float], size: int, network: WideResNet, rng: torch.Generator
) -> None:
    """On a network, from logits alone, one image at a time and in float64; with another number of images of the p(x) term.

    p_x (f(x-) - f(x+)) + p_y CE(x) + p_xadv (f(x~) - f(x+)) + p_yadv CE(x~), each f a mean of logsumexp over its own images.
    """
    own = [f"experiments.eb_jdat.form={name}", f"experiments.eb_jdat.base={base}"]
    weights = load(ROOT / "params/digits.yaml", own).training_settings("eb_jdat").weights
    x, moved = torch.rand(2, 8, 1, 8, 8, generator=rng) * 2 - 1
    density, chains = torch.rand(2, size, 1, 8, 8, generator=rng) * 2 - 1
    y = torch.arange(8) % 10
    network.eval()  # each image by itself
    terms = recipes.eb_jdat(network, Batch(x, density, y), {"negatives": chains, "adversarial": moved}, weights)

    def logits(images: Tensor) -> list[list[float]]:
        with torch.no_grad():
            return [network(image[None])[0].double().tolist() for image in images]

    def f(images: Tensor) -> float:
        return sum(map(lse, logits(images))) / len(images)

    def cross_entropy(images: Tensor) -> float:
        return sum(lse(row) - row[int(k)] for row, k in zip(logits(images), y, strict=True)) / len(images)

    p_x, p_xadv, p_y = w
    expected = p_x * (f(chains) - f(density)) + p_y * cross_entropy(x) + p_xadv * (f(moved) - f(density)) + p_y * cross_entropy(moved)
    assert float(terms.loss.detach()) == pytest.approx(expected, abs=1e-5)  # float32
