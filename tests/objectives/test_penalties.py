"""Penalties on derivatives, explanations, ranks and energies: closed forms, slow loops, finite differences, limiting cases."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat import registry
from ebjdat.data.batches import Batch
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import penalties, recipes
from ebjdat.objectives.sampling import SamplingState
from ebjdat.objectives.terms import Terms
from ebjdat.settings import TrainingSettings, WeightSettings
from tests.objectives.test_recipes import (
    ADVERSARIAL,
    BATCH,
    CLEAN,
    DENSITY,
    FIVE,
    LABELS,
    NEGATIVE,
    OTHER,
    SAME,
    SAMPLES,
    LinearSoftmax,
    Rows,
    Table,
    ce,
    loss_and_gradient,
    lse,
)

JACOBIAN = {
    "nuisance": penalties.matched_jacobian,
    "nuisance_isotropic": penalties.jacobian_isotropic,
    "nuisance_complement": penalties.jacobian_complement,
    "nuisance_shuffled": penalties.jacobian_shuffled,
}
ROWS = [CLEAN, DENSITY, NEGATIVE, ADVERSARIAL]
D = 16  # pixels of a 4x4 image


def images(n: int, seed: int = 0) -> tuple[Batch, Tensor]:
    """n images of 4x4 pixels, and neighbours that lie further away in some directions than in others."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=rng) - 0.5
    moved = x + 0.1 * torch.randn(x.shape, generator=rng) * torch.linspace(0.2, 3, D).view(1, 1, 4, 4) + 0.05
    return Batch(x, x, torch.arange(n) % 3), moved


def drawn(name: str, batch: Batch, moved: Tensor, settings: TrainingSettings, seed: int = 0) -> Tensor:
    made = SamplingState(settings, made={"adversarial": moved})
    return registry.load(registry.SAMPLES, name)(None, batch, made, torch.Generator().manual_seed(seed))  # type: ignore[no-any-return]


# ---- matched Jacobian


@pytest.mark.parametrize("name", JACOBIAN)
def test_the_jacobian_penalty_of_a_linear_network_is_a_trace(name: str, settings: TrainingSettings) -> None:
    """E |W u|^2 = tr(W S W'), S from its definition, float64: mean d d' over the first 8 (half of 16 pixels) differences; all alike;
    all alike but orthogonal to these; of the image before's neighbours. Each has the trace of the first.

    Mean over 40,000 displacements: a standard error of at most sqrt(2 / 40,000) = 0.7 %.
    """
    batch, moved = images(400)
    model = LinearSoftmax(3)
    w = model.weight.detach().double()
    d = (moved - batch.x).flatten(1).double()[:8]
    other = torch.stack([moved[i - 1] - batch.x[i] for i in range(8)]).flatten(1).double()
    outside = torch.eye(D).double() - torch.linalg.pinv(d) @ d
    one = torch.eye(D).double()
    of = {"nuisance": d.T @ d, "nuisance_isotropic": one, "nuisance_complement": outside, "nuisance_shuffled": other.T @ other}[name]
    trace = float(d.square().sum()) / 8
    expected = float(torch.trace(w @ of @ w.T)) * trace / float(torch.trace(of))
    squares, lengths = [], []
    for seed in range(100):
        u = drawn(name, batch, moved, settings, seed)
        strong, weak = (JACOBIAN[name](model, batch, {name: u}, WeightSettings(delta=value)) for value in (0.5, 0.0))
        squares.append(float((strong.loss - weak.loss).detach()) / 0.5)
        lengths.append(float(u.square().sum()) / 400)
        if seed == 0:
            assert float(strong.logged["jacobian"]) == pytest.approx(squares[0], rel=1e-4)
            along = (u.flatten(1).double() @ d.T).abs().max()
            assert (along < 1e-5) == (name == "nuisance_complement")
    assert sum(squares) / 100 == pytest.approx(expected, rel=0.03)
    assert sum(lengths) / 100 == pytest.approx(trace, rel=0.02)


def test_each_image_has_a_displacement_of_its_own_within_the_span_of_the_differences(settings: TrainingSettings) -> None:
    batch, moved = images(6)  # fewer than half the pixels: all of them count
    u = drawn("nuisance", batch, moved, settings).flatten(1)
    d = (moved - batch.x).flatten(1)
    assert torch.linalg.matrix_rank(u) == 6
    assert torch.linalg.matrix_rank(torch.cat([u, d]), rtol=1e-4) == 6


@pytest.mark.parametrize("name", JACOBIAN)
def test_without_differences_the_jacobian_penalty_is_zero(name: str, network: WideResNet, settings: TrainingSettings) -> None:
    """S = 0: the cross-entropy of clean images, as `classifier` has it, and its gradients."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=rng) * 2 - 1
    batch = Batch(x, x, torch.arange(8))
    u = drawn(name, batch, x.clone(), settings)
    assert not u.any()
    found, expected = (
        JACOBIAN[name](network, batch, {name: u}, WeightSettings(delta=9.0)),
        recipes.classifier(network, batch, {}, WeightSettings()),
    )
    assert float(found.loss) == pytest.approx(float(expected.loss), abs=1e-6)
    assert found.logged["batch_clean_acc"] == expected.logged["batch_clean_acc"]
    for a, b in zip(*(torch.autograd.grad(terms.loss, network.stem.weight) for terms in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_isotropic_displacements_estimate_the_jacobians_square_norm(network: WideResNet, settings: TrainingSettings) -> None:
    """Hutchinson: E |J u|^2 = s^2 |J|_F^2, the Jacobian row by row. 4,000 displacements: a standard error of at most 2.2 %."""
    network.eval()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = torch.autograd.functional.jacobian(lambda at: network(at)[0], image)
    x = image.repeat(4000, 1, 1, 1)
    batch = Batch(x, x, torch.zeros(4000, dtype=torch.long))
    u = drawn("nuisance_isotropic", batch, x + 0.1, settings)
    square = penalties.jacobian_isotropic(network, batch, {"nuisance_isotropic": u}, WeightSettings()).logged["jacobian"]
    assert float(square) == pytest.approx(0.01 * float(whole.square().sum()), rel=0.07)  # |d|^2 / 64 = 0.1^2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_derivative_along_u_by_two_backward_passes(mode: str, network: WideResNet) -> None:
    """torch's own, in fp32, through batch norm in both modes. The pass counts once in running statistics, with the same logits."""
    rng = torch.Generator().manual_seed(2)
    network.train(mode == "train")
    once, again = copy.deepcopy(network), copy.deepcopy(network)
    x, u = (torch.randn(6, 1, 8, 8, generator=rng) for _ in range(2))
    logits, along = penalties.derivative_along(network, x, u)
    expected, twice = torch.autograd.functional.jvp(again, x, u)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(along, twice, atol=1e-4 * float(twice.abs().max()))
    assert float(twice.abs().max()) > 0.1
    once(x)
    for name, value in once.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, atol=1e-6), name


def test_the_derivative_along_u_by_finite_differences() -> None:
    """With batch norm in train mode, float64; also the penalty's own derivative by the weights."""
    rng = torch.Generator().manual_seed(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (nn.Conv2d(i, 8, 3, padding=1) for i in (1, 8))
        layers = (first, nn.BatchNorm2d(8), nn.LeakyReLU(0.2), second, nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(512, 3))
        model = nn.Sequential(*layers).double()
    x, u = (torch.randn(6, 1, 8, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    along = penalties.derivative_along(model, x, u)[1]
    h = 1e-6
    with torch.no_grad():
        differences = (model(x + h * u) - model(x - h * u)) / (2 * h)
    assert torch.allclose(along, differences, atol=1e-6 * float(differences.abs().max()) + 1e-6)

    def penalty() -> Tensor:
        return penalties.derivative_along(model, x, u)[1].square().sum()

    weight = second.weight
    direction = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
    slope = float((torch.autograd.grad(penalty(), weight)[0] * direction).sum())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
        values.append(float(penalty()))
        with torch.no_grad():
            weight -= sign * h * direction
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)
    assert abs(slope) > 1e-3


# ---- EGAT-style


def test_saliencies_of_a_linear_network_agree_and_those_of_an_image_with_itself(network: WideResNet) -> None:
    """The input gradient of z_y is W_y everywhere; and x~ = x."""
    batch, moved = images(6)
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for model, at, samples in ((LinearSoftmax(3), batch, {"adversarial": moved}), (network, Batch(x, x, batch.y), {"adversarial": x})):
        strong, weak = (penalties.egat_style(model, at, samples, WeightSettings(delta=value)) for value in (9.0, 0.0))
        assert float(strong.loss) == pytest.approx(float(weak.loss), abs=1e-4)
        assert float(strong.logged["saliency"]) == pytest.approx(1, abs=1e-5)
        assert float(weak.loss) == pytest.approx(float(F.cross_entropy(model(samples["adversarial"]), batch.y)), abs=1e-5)


class Bent(nn.Module):
    """Logits of a smooth network with one hidden layer; scale: a factor of all logits."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(7)
        self.first, self.second = (nn.Parameter(torch.randn(*shape, generator=rng)) for shape in ((12, D), (3, 12)))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x.flatten(1) @ self.first.T).tanh() @ self.second.T


@pytest.mark.parametrize("control", ["none", "shuffled", "mean_matched"])
def test_egat_style_by_finite_differences(control: str) -> None:
    """1 - cos of |differences of z_y|, pixel by pixel; float64. Its gradient passes G(x~) alone; scaling z changes nothing."""
    batch, moved = images(4)
    x, moved, model = batch.x.double(), moved.double(), Bent().double()

    def saliency(at: Tensor, y: Tensor, graph: bool = False) -> Tensor:
        steps = 1e-6 * torch.eye(D).double().view(D, 1, 4, 4)
        slope = (model(at + steps)[:, y] - model(at - steps)[:, y]) / 2e-6
        return (slope if graph else slope.detach()).abs()

    def expected() -> Tensor:
        targets = [saliency(x[i : i + 1], batch.y[i]) for i in range(4)]
        given = {"none": targets, "shuffled": [targets[-1], *targets[:-1]], "mean_matched": [sum(targets) / 4] * 4}[control]
        pairs = [(target, saliency(moved[i : i + 1], batch.y[i], graph=True)) for i, target in enumerate(given)]
        return sum((1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs), torch.zeros(())) / 4

    weights = WeightSettings(delta=0.7, control=control)
    own = Batch(x, x, batch.y)
    terms = penalties.egat_style(model, own, {"adversarial": moved}, weights)
    ce = F.cross_entropy(model(moved), batch.y)
    assert float(terms.loss) == pytest.approx(float(ce + 0.7 * expected()), abs=1e-6)
    assert float(terms.logged["saliency"]) == pytest.approx(1 - float(expected()), abs=1e-6)
    (found,), (by_hand,) = (torch.autograd.grad(loss, model.first) for loss in (terms.loss, ce + 0.7 * expected()))
    assert torch.allclose(found, by_hand, atol=1e-5)
    scaled = penalties.egat_style(Bent(3.0).double(), own, {"adversarial": moved}, weights)
    assert float(scaled.logged["saliency"]) == pytest.approx(float(terms.logged["saliency"]), abs=1e-9)


# ---- AAT-style


def lead(row: list[float], y: int) -> float:
    return row[y] - max(value for k, value in enumerate(row) if k != y)


@pytest.mark.parametrize("control", ["none", "shuffled", "mean_matched"])
def test_aat_style_by_a_slow_loop(control: str) -> None:
    """Every image against every anchor that it led by more than 1; anchors have no gradient."""
    model = Rows()
    before, after = (
        [lead(model.rows[int(i)].tolist(), int(y)) for i, y in zip(rows, LABELS, strict=True)] for rows in (FIVE.x, OTHER["adversarial"])
    )
    given = {"none": before, "shuffled": [before[-1], *before[:-1]], "mean_matched": [sum(before) / 5] * 5}[control]
    hinges = [max(0.0, 0.5 - (after[i] - given[a])) for i in range(5) for a in range(5) if before[i] - before[a] > 1]
    assert len(hinges) > 3
    assert any(hinges)
    robust = float(F.cross_entropy(model(OTHER["adversarial"]), LABELS))
    terms = penalties.aat_style(model, FIVE, OTHER, WeightSettings(delta=0.8, control=control))
    assert float(terms.loss) == pytest.approx(robust + 0.8 * sum(hinges) / len(hinges), abs=1e-5)
    (gradient,) = torch.autograd.grad(terms.loss, model.rows)
    assert gradient[:5].abs().sum() == 0
    assert (gradient[5:10].abs().sum(1) > 0).all()


def test_ranks_that_an_attack_leaves_or_a_single_image_cost_nothing() -> None:
    model = Rows()
    one = Batch(FIVE.x[:1], FIVE.x[:1], LABELS[:1])
    for batch, samples in ((FIVE, SAME), (one, {"adversarial": OTHER["adversarial"][:1]})):
        terms = penalties.aat_style(model, batch, samples, WeightSettings(delta=9.0))
        assert float(terms.loss) == pytest.approx(float(F.cross_entropy(model(samples["adversarial"]), batch.y)), abs=1e-6)
        assert terms.logged["ranking"] == 0


def test_half_at_by_hand() -> None:
    loss, gradient = loss_and_gradient(Table(ROWS), penalties.half_at, WeightSettings())
    assert loss == pytest.approx((ce(CLEAN) + ce(ADVERSARIAL)) / 2, abs=1e-6)
    assert gradient[1:3].abs().sum() == 0


# ---- JEAT-style


JOINT = {**SAMPLES, "corner": torch.tensor([1])}


@pytest.mark.parametrize(
    ("recipe", "positive", "negative"),
    [
        (penalties.jeat_style, ADVERSARIAL, NEGATIVE),
        (penalties.jeat_noise, DENSITY, NEGATIVE),  # the table's row 1 is its corner
        (penalties.jeat_no_chains, ADVERSARIAL, DENSITY),
    ],
)
def test_jeat_style_and_its_controls_by_hand(recipe: Callable[..., Terms], positive: list[float], negative: list[float]) -> None:
    """E(x~, y) - E(x-) = -z_y(x~) + lse z(x-); a step lowers the joint energy of x~ and raises the energy of x-."""
    table = Table(ROWS)
    terms = recipe(table, BATCH, JOINT, WeightSettings())
    assert float(terms.loss) == pytest.approx(-positive[1] + lse(negative), abs=1e-6)
    (gradient,) = torch.autograd.grad(terms.loss, table.rows)
    for row, slope in zip(ROWS, gradient.tolist(), strict=True):
        p = torch.tensor(row).softmax(0).tolist()
        assert slope == pytest.approx([0, -1] if row is positive else p if row is negative else [0, 0], abs=1e-6)
    for w1, w3, l2 in ((0.5, 1.0, 0.0), (1.0, 3.0, 0.0), (1.0, 1.0, 0.3)):
        loss = float(recipe(table, BATCH, JOINT, WeightSettings(w1=w1, w3=w3, energy_l2=l2)).loss)
        expected = w1 * (lse(negative) - lse(positive)) + w3 * ce(positive) + l2 * (lse(positive) ** 2 + lse(negative) ** 2)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_without_a_radius_jeat_style_is_jem(network: WideResNet) -> None:
    """x~ = x: JEM's loss and gradients at w1 = w3 = 1, on a network; fp32, in another order of summands."""
    rng = torch.Generator().manual_seed(3)
    x, chains = (torch.rand(8, 1, 8, 8, generator=rng) * 2 - 1 for _ in range(2))
    batch = Batch(x, x, torch.arange(8))
    theirs = recipes.jem(network, batch, {"negatives": chains}, WeightSettings())
    ours = penalties.jeat_style(network, batch, {"negatives": chains, "adversarial": x}, WeightSettings())
    assert float(ours.loss) == pytest.approx(float(theirs.loss), abs=1e-6)
    for name, weight in network.named_parameters():
        (a,), (b,) = (torch.autograd.grad(terms.loss, weight, retain_graph=True) for terms in (ours, theirs))
        assert torch.allclose(a, b, atol=1e-5), name
    logits = network(x)
    energy = -logits.gather(1, batch.y[:, None]).mean() + network(chains).logsumexp(1).mean()
    assert float(ours.loss) == pytest.approx(float(energy), abs=1e-5)
    assert math.isfinite(float(energy))
