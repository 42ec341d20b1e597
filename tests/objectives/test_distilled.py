"""Distillation against closed forms: on logits that are looked up, and on a linear network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.objectives import distilled, recipes, sampling
from ebjdat.objectives.sampling import SamplingState, neighbours
from ebjdat.objectives.terms import Terms
from ebjdat.samplers import pgd
from ebjdat.settings import AdversarySettings, TrainingSettings, WeightSettings
from tests.networks import Table
from tests.training.conftest import METHODS, changed

K, B = 5, 6
Y = torch.tensor([0, 1, 2, 3, 4, 0])
Loss = Callable[..., Terms]
LOSSES: list[Loss] = [distilled.ard, distilled.rslad, distilled.iad, distilled.adaad]


@pytest.fixture
def student(rng: torch.Generator) -> Table:
    return Table(torch.randn(2 * B, K, generator=rng))


@pytest.fixture
def teacher(rng: torch.Generator) -> Tensor:
    return 2 * torch.randn(2 * B, K, generator=rng)


def of(loss: Loss, student: nn.Module, teacher: Tensor, trust: float = 0.4, **weights: Any) -> Terms:
    samples = {"adversarial": torch.arange(B, 2 * B), "taught": teacher[:B], "taught_adversarial": teacher[B:]}
    x = torch.arange(B)
    return loss(student, Batch(x, x, Y), {**samples, "trust": torch.full((B,), trust)}, WeightSettings(**weights))


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of the sum over classes, number by number."""
    rows = zip(p.softmax(1).tolist(), q.softmax(1).tolist(), strict=True)
    return sum(a * math.log(a / b) for one, other in rows for a, b in zip(one, other, strict=True)) / len(p)


def test_losses_by_hand(student: Table, teacher: Tensor) -> None:
    clean, adversarial = student.rows.detach().split(B)
    at_x, at_moved = teacher.split(B)
    ce = -sum(math.log(row.softmax(0)[y]) for row, y in zip(clean, Y, strict=True)) / B
    expected = {
        distilled.ard: 0.7 * 9 * kl(at_x / 3, adversarial / 3) + 0.3 * ce,
        distilled.rslad: 0.7 * kl(at_x, adversarial) + 0.3 * kl(at_x, clean),
        distilled.iad: kl(at_x, adversarial) + 0.6 * kl(clean, adversarial),
        distilled.adaad: kl(at_moved, adversarial),
    }
    for loss, value in expected.items():
        assert float(of(loss, student, teacher, taught=0.7, temperature=3.0).loss) == pytest.approx(value, rel=1e-5), loss.__name__


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_is_its_teacher_and_not_attacked_has_nothing_to_learn(loss: Loss, rng: torch.Generator) -> None:
    """(METHODS: T = S and x~ = x give 0.) Tolerance: single precision."""
    logits = torch.randn(B, K, generator=rng).repeat(2, 1)
    student = Table(logits.clone())
    terms = of(loss, student, logits, temperature=4.0)
    (gradient,) = torch.autograd.grad(terms.loss, student.rows)
    assert float(terms.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


def test_a_teacher_that_is_certain_of_the_labels_is_adversarial_training(student: Table) -> None:
    """KL from a one-hot distribution is the cross-entropy. Gradients too."""
    certain = 60 * F.one_hot(Y, K).float().repeat(2, 1)
    x = torch.arange(B)
    by_labels = recipes.pgd_at(student, Batch(x, x, Y), {"adversarial": torch.arange(B, 2 * B)}, WeightSettings())
    (expected,) = torch.autograd.grad(by_labels.loss, student.rows)
    for loss in (distilled.ard, distilled.adaad):
        terms = of(loss, student, certain)
        (gradient,) = torch.autograd.grad(terms.loss, student.rows)
        assert float(terms.loss.detach()) == pytest.approx(float(by_labels.loss.detach()), rel=1e-5)
        assert torch.allclose(gradient, expected, atol=1e-6)


def test_a_trusted_teacher_makes_iad_ard(student: Table, teacher: Tensor) -> None:
    assert float(of(distilled.iad, student, teacher, trust=1.0).loss) == pytest.approx(
        float(of(distilled.ard, student, teacher).loss), 1e-6
    )


def test_at_a_high_temperature_ard_matches_logits(student: Table, teacher: Tensor) -> None:
    """t^2 KL -> half the mean square of the centred difference of logits. In double precision, to 1 % at t = 1000."""
    double, logits = Table(student.rows.detach().double()), teacher.double()
    d = logits[:B] - double.rows.detach()[B:]
    expected = float((d - d.mean(1, keepdim=True)).square().mean() / 2)
    assert float(of(distilled.ard, double, logits, temperature=1000.0).loss) == pytest.approx(expected, rel=1e-2)


def test_controls_keep_the_teachers_confidence_and_lose_what_it_says_of_other_classes(teacher: Tensor) -> None:
    logits = teacher[:B]
    own = logits.softmax(1)
    shuffled = distilled.taught(logits, Y, WeightSettings(control="shuffled")).softmax(1)
    sure = own.gather(1, Y[:, None])[:, 0]
    assert torch.allclose(shuffled.gather(1, Y[:, None])[:, 0], sure.roll(1), atol=1e-6)
    assert torch.allclose(shuffled.sort(1).values, own.roll(1, 0).sort(1).values, atol=1e-6)  # the next image's probabilities, moved
    even = distilled.taught(logits, Y, WeightSettings(control="mean_matched")).softmax(1)
    for row, y in zip(even, Y, strict=True):
        expected = [float(sure.mean()) if k == y else (1 - float(sure.mean())) / (K - 1) for k in range(K)]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def pair(rng: torch.Generator) -> tuple[Linear, Linear]:
    return Linear(torch.randn(K, 4, generator=rng)), Linear(torch.randn(K, 4, generator=rng)).requires_grad_(False)


def test_scores_of_a_teacher_and_their_gradients(pair: tuple[Linear, Linear], rng: torch.Generator) -> None:
    """Of linear networks: KL(T||S) has the gradient W_S' (s - t) in the student's logits; where T moves too, a term of its own.

    Against finite differences in double precision, to 1e-6.
    """
    student, teacher = (network.double() for network in pair)
    x, y = torch.randn(3, 1, 2, 2, generator=rng).double(), torch.zeros(3, dtype=torch.long)
    moved = (x + 0.1 * torch.randn(x.shape, generator=rng).double()).requires_grad_(True)
    for make in (pgd.kl_teacher_score, pgd.kl_disagree_score):
        score = make(student, x, y, teacher)
        target = teacher(x if make is pgd.kl_teacher_score else moved.detach())
        for i in range(3):
            assert float(score(moved.detach())[i]) == pytest.approx(kl(target[i : i + 1], student(moved.detach())[i : i + 1]), rel=1e-9)
        (gradient,) = torch.autograd.grad(score(moved).sum(), moved)
        for i in range(moved.numel()):
            step = torch.zeros_like(moved).flatten()
            step[i] = 1e-6
            up, down = (score(moved.detach() + sign * step.view_as(moved)).sum() for sign in (1, -1))
            assert float(gradient.flatten()[i]) == pytest.approx(float(up - down) / 2e-6, abs=1e-6)


def test_neighbours_ascend_what_the_score_says_of_the_teacher(pair: tuple[Linear, Linear], rng: torch.Generator) -> None:
    student, teacher = pair
    x, y = torch.rand(16, 1, 2, 2, generator=rng) - 0.5, torch.zeros(16, dtype=torch.long)
    for name, make in (("kl_teacher", pgd.kl_teacher_score), ("kl_disagree", pgd.kl_disagree_score)):
        spec = AdversarySettings(score=name, eps=0.1, step_size=0.05, steps=5, start="gaussian", mode="eval")
        moved = neighbours(student, x, y, spec, rng, teacher=teacher)
        score = make(student, x, y, teacher)
        assert (score(moved) >= score(x)).all()
        assert (moved - x).abs().max() <= 0.2 + 1e-6  # eps of [0, 1] pixels, in [-1, 1]


def test_a_random_sign_walks_to_a_corner_whatever_the_network(pair: tuple[Linear, Linear], rng: torch.Generator) -> None:
    x, y = torch.zeros(200, 1, 2, 2), torch.zeros(200, dtype=torch.long)
    spec = AdversarySettings(score="random_sign", eps=0.1, step_size=0.05, steps=4, start="clean")
    first, second = (neighbours(pair[0], x, y, spec, rng) for _ in range(2))
    assert torch.allclose(first.abs(), torch.tensor(0.2))
    assert 0.4 < float((first > 0).float().mean()) < 0.6
    assert not torch.equal(first, second)


def test_the_teacher_is_asked_at_the_image_and_at_its_neighbour_and_trusted_by_its_label(pair: tuple[Linear, Linear]) -> None:
    """w = T_y(x~)^trust after the first epochs, 1 in them."""
    student, teacher = pair
    settings: TrainingSettings = changed(METHODS.training_settings("iad"), epochs=10, weights={"alone": 0.3, "trust": 0.5})
    x, moved, y = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2), torch.tensor([0, 1, 4])
    batch, made = Batch(x, x, y), {"adversarial": moved}
    state = SamplingState(settings, epoch=3, teacher=teacher, made=made)
    of_x, of_moved = (sample(student, batch, state, torch.Generator()) for sample in (sampling.taught, sampling.taught_adversarial))  # type: ignore[operator]
    assert torch.equal(of_x, teacher(x))
    assert torch.equal(of_moved, teacher(moved))
    made["taught_adversarial"] = of_moved
    expected = teacher(moved).softmax(1)[torch.arange(3), y].sqrt()
    assert torch.allclose(sampling.trust(student, batch, state, torch.Generator()), expected)  # type: ignore[arg-type]
    early = SamplingState(settings, epoch=2, teacher=teacher, made=made)
    assert torch.equal(sampling.trust(student, batch, early, torch.Generator()), torch.ones(3))  # type: ignore[arg-type]
