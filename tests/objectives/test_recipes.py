"""Losses against values computed by hand on fixed logits, sign by sign."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import recipes
from ebjdat.objectives.terms import Terms
from ebjdat.settings import TrainingSettings, WeightSettings, load
from tests.conftest import ROOT
from tests.networks import Table

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


# ---- adversarial trainings beyond PGD-AT and TRADES

K = 4


class Rows(Table):
    """A table of random logits: images 0 to 4 are clean, 5 to 9 adversarial, 10 to 14 corners."""

    def __init__(self, classes: int = K) -> None:
        super().__init__((2 * torch.randn(15, classes, generator=torch.Generator().manual_seed(1))).tolist())


LABELS = torch.tensor([0, 1, 1, 0, 1])
OTHER = {"adversarial": torch.arange(5, 10), "corner": torch.arange(10, 15)}
SAME = {"adversarial": torch.arange(5), "corner": torch.arange(5)}
FIVE = Batch(x=torch.arange(5), x_density=torch.arange(5), y=LABELS)


def probabilities(model: Rows, rows: Tensor) -> Tensor:
    return model.rows.detach()[rows].softmax(1)


def divergences(p: Tensor, q: Tensor) -> list[float]:
    return [sum(a * math.log(a / b) for a, b in zip(x.tolist(), y.tolist(), strict=True) if a) for x, y in zip(p, q, strict=True)]


@pytest.mark.parametrize("control", ["none", "shuffled", "mean_matched"])
def test_mart_by_hand(control: str) -> None:
    model = Rows()
    p, q = probabilities(model, FIVE.x), probabilities(model, OTHER["adversarial"])
    missed = [1 - float(p[i, y]) for i, y in enumerate(LABELS)]
    given = {"none": missed, "shuffled": [missed[-1], *missed[:-1]], "mean_matched": [sum(missed) / 5] * 5}[control]
    bce = [-math.log(q[i, y]) - math.log(1.0001 - max(float(q[i, k]) for k in range(K) if k != y)) for i, y in enumerate(LABELS)]
    expected = [b + 5 * w * kl for b, w, kl in zip(bce, given, divergences(p, q), strict=True)]
    terms = recipes.mart(model, FIVE, OTHER, WeightSettings(beta=5.0, control=control))
    assert float(terms.loss.detach()) == pytest.approx(sum(expected) / 5, abs=1e-5)


def test_marts_margin_is_the_cross_entropy_of_two_classes() -> None:
    """K = 2: 1 - max p_k = p_y, so BCE = 2 CE, up to the guard of 1e-4."""
    model = Rows(classes=2)
    loss = recipes.mart(model, FIVE, OTHER, WeightSettings(beta=0.0)).loss
    assert float(loss) == pytest.approx(2 * float(F.cross_entropy(model(OTHER["adversarial"]), LABELS)), rel=2e-3)


def test_mart_pulls_clean_images_up_through_its_weight() -> None:
    """The gradient passes 1 - p_y(x): without it, the clean row's gradient is only that of the divergence."""
    model = Rows()
    (full,) = torch.autograd.grad(recipes.mart(model, FIVE, OTHER, WeightSettings()).loss, model.rows)
    clean, adversarial = model(FIVE.x), model(OTHER["adversarial"]).detach()
    p = clean.softmax(1)
    weight = 1 - p.gather(1, LABELS[:, None])[:, 0]
    kl = (p * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum(1)
    (by_hand,) = torch.autograd.grad((6 * weight * kl).mean(), model.rows)
    assert torch.allclose(full[:5], by_hand[:5], atol=1e-6)


@pytest.mark.parametrize("recipe", [recipes.trades, recipes.weat_adv])
def test_weat_weighs_trades_by_energy(recipe: Callable[..., Terms]) -> None:
    """Weights from E(x); with one energy for all, a constant times the unweighted loss; a shift of all logits changes them."""
    model = Rows()
    with torch.no_grad():
        model.rows -= model.rows.logsumexp(1, keepdim=True) - 3.0  # E = -3 for every row
    bare = recipe(model, FIVE, OTHER, WeightSettings(beta=7.0)).loss
    weighted = recipe(model, FIVE, OTHER, WeightSettings(beta=7.0, examples={"name": "weat"})).loss
    assert float(weighted) == pytest.approx(float(bare) / math.log(1 + math.exp(3)), rel=1e-5)
    first = FIVE.x if recipe is recipes.trades else OTHER["adversarial"]
    kl = sum(divergences(probabilities(model, FIVE.x), probabilities(model, OTHER["adversarial"]))) / 5
    assert float(bare) == pytest.approx(float(F.cross_entropy(model(first), LABELS)) + 7 * kl, abs=1e-4)
    with torch.no_grad():
        model.rows += 4.0
    moved = recipe(model, FIVE, OTHER, WeightSettings(beta=7.0, examples={"name": "weat"})).loss
    assert float(moved) == pytest.approx(float(bare) / math.log(1 + math.exp(7)), rel=1e-5)


@pytest.mark.parametrize(("recipe", "rows"), [(recipes.der, "adversarial"), (recipes.der_random, "corner")])
def test_der_adds_the_energy_change(recipe: Callable[..., Terms], rows: str) -> None:
    model = Rows()
    energy = -model.rows.detach().logsumexp(1)
    ce = float(F.cross_entropy(model(OTHER["adversarial"]), LABELS))
    change = float((energy[FIVE.x] - energy[OTHER[rows]]).abs().mean())
    assert float(recipe(model, FIVE, OTHER, WeightSettings(delta=0.5)).loss) == pytest.approx(ce + 0.5 * change, abs=1e-5)
    with torch.no_grad():  # the same number for every class: another energy of both, the same change
        model.rows += 9.0
    assert float(recipe(model, FIVE, OTHER, WeightSettings(delta=0.5)).loss) == pytest.approx(ce + 0.5 * change, abs=1e-5)


def test_second_order_targets() -> None:
    """Rows are distributions with 0.2 on their class; scale-free; equal among other classes where A is a multiple of 1."""
    z = torch.randn(7, K, generator=torch.Generator().manual_seed(3))
    targets = recipes.second_order_targets(z)
    second = [[abs(sum(float(z[b, i] * z[b, j]) for b in range(7))) for j in range(K)] for i in range(K)]
    for i in range(K):
        apart = [max(second[i]) - second[i][j] if i != j else 0.0 for j in range(K)]
        assert targets[i].tolist() == pytest.approx([0.2 if i == j else 0.8 * apart[j] / sum(apart) for j in range(K)], abs=1e-5)
    assert torch.allclose(recipes.second_order_targets(10 * z), targets, atol=1e-6)
    flat = torch.full((K, K), 0.8 / 3).fill_diagonal_(0.2)
    assert torch.allclose(recipes.second_order_targets(torch.eye(K)), flat)
    assert torch.allclose(recipes.second_order_targets(torch.ones(2, K)), flat)  # all off-diagonals are the row's maximum


@pytest.mark.parametrize(("recipe", "t", "beta"), [(recipes.s2o, 0.05, 0.0), (recipes.s2o_trades, 0.15, 6.0)])
def test_s2o_by_hand(recipe: Callable[..., Terms], t: float, beta: float) -> None:
    model = Rows()
    p, q = probabilities(model, FIVE.x), probabilities(model, OTHER["adversarial"])
    of_clean, of_moved = (recipes.second_order_targets(model.rows.detach()[rows])[LABELS] for rows in (FIVE.x, OTHER["adversarial"]))
    pair = [a + b for a, b in zip(divergences(of_clean, p), divergences(of_moved, q), strict=True)]
    first = F.cross_entropy(model(FIVE.x if beta else OTHER["adversarial"]), LABELS)
    expected = (1 - 2 * t) * float(first) + t * sum(pair) / 5 + beta * sum(divergences(p, q)) / 5
    assert float(recipe(model, FIVE, OTHER, WeightSettings(targets=t, beta=beta)).loss) == pytest.approx(expected, abs=1e-5)


def test_s2os_control_is_label_smoothing() -> None:
    """The mean of all rows of M for each class. With logits whose M has equal rows but for the diagonal, nothing changes."""
    model = Rows()
    mean = recipes.second_order_targets(model.rows.detach()[FIVE.x]).mean(0)
    p = probabilities(model, FIVE.x)
    loss = recipes.s2o(model, FIVE, SAME, WeightSettings(targets=0.5, control="mean_matched")).loss
    assert float(loss) == pytest.approx(2 * 0.5 * sum(divergences(mean.expand(5, K), p)) / 5, abs=1e-5)


@pytest.mark.parametrize("recipe", [recipes.trades, recipes.mart, recipes.weat_adv, recipes.der, recipes.der_random])
def test_without_a_perturbation_consistency_terms_are_zero(recipe: Callable[..., Terms]) -> None:
    model = Rows()
    strong, weak = (recipe(model, FIVE, SAME, WeightSettings(beta=value, delta=value)).loss for value in (9.0, 0.0))
    assert float(strong) == pytest.approx(float(weak), abs=1e-6)


class LinearSoftmax(nn.Module):
    """Logits W x of flat images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_gradalign_of_a_linear_network_with_two_classes_is_zero() -> None:
    """There, input gradients at all points of one label are parallel: the cosine is 1; with more classes it is not."""
    rng = torch.Generator().manual_seed(5)
    x = torch.rand(6, 1, 4, 4, generator=rng)
    samples = {"adversarial": x + 0.1, "uniform": x + 0.3 * torch.rand(x.shape, generator=rng)}
    batch = Batch(x, x, torch.tensor([0, 1, 0, 1, 1, 0]))
    for classes, aligned in ((2, True), (5, False)):
        model = LinearSoftmax(classes)
        strong, weak = (recipes.gradalign(model, batch, samples, WeightSettings(delta=value)).loss for value in (1.0, 0.0))
        assert (abs(float(strong - weak)) < 1e-5) == aligned


def test_gradalign_by_finite_differences() -> None:
    """1 - cos of input gradients that are differences of the loss; its own gradient passes the second point alone. float64."""
    rng = torch.Generator().manual_seed(6)
    x = torch.rand(2, 1, 4, 4, generator=rng, dtype=torch.float64)
    samples = {"adversarial": x, "uniform": x + torch.rand(x.shape, generator=rng, dtype=torch.float64)}
    batch, model = Batch(x, x, torch.tensor([0, 2])), LinearSoftmax(3).double()

    def slope(at: Tensor, y: Tensor) -> Tensor:
        moved = [
            F.cross_entropy(model(at + h), y) - F.cross_entropy(model(at - h), y) for h in 1e-6 * torch.eye(16).double().view(16, 1, 4, 4)
        ]
        return torch.stack(moved).detach() / 2e-6

    pairs = [(slope(x[i : i + 1], batch.y[i : i + 1]), slope(samples["uniform"][i : i + 1], batch.y[i : i + 1])) for i in range(2)]
    cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    ce = float(F.cross_entropy(model(x), batch.y))
    terms = recipes.gradalign(model, batch, samples, WeightSettings(delta=0.7))
    assert float(terms.loss) == pytest.approx(ce + 0.7 * (2 - sum(cosines)) / 2, abs=1e-5)
    assert torch.autograd.grad(terms.loss, model.weight)[0].abs().sum() > 0


def test_gradalign_counts_an_image_without_a_gradient_as_aligned() -> None:
    model = LinearSoftmax(3)
    with torch.no_grad():
        model.weight.zero_()
    x = torch.rand(2, 1, 4, 4)
    terms = recipes.gradalign(model, Batch(x, x, torch.tensor([0, 1])), {"adversarial": x, "uniform": x}, WeightSettings(delta=5.0))
    assert float(terms.loss) == pytest.approx(math.log(3), abs=1e-6)
