"""Integrity checks against networks whose gradients, images or classes are not as they should be."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ebjdat.evaluation import checks
from ebjdat.evaluation.audit import audit
from ebjdat.evaluation.verdicts import Verdicts

from ..conftest import Linear
from ..networks import Curved, N, Of, images, labelled, settings


def caught(model: nn.Module, x: Tensor, y: Tensor, source: nn.Module | None = None, eps: float = 0.012) -> dict[str, bool | None]:
    """Check -> passed; those of a protocol: of the quick one, with its ensemble on every image."""
    asked = settings(eps)
    asked = asked.model_copy(update={"protocols": {"standard": settings(eps, 0).standard, "quick": asked.protocols["quick"]}})
    found = audit(model, x, y, asked, source).metrics
    assert found["checks_failed"] == sum(check["passed"] is False for check in found["checks"])
    return {check["name"]: check["passed"] for check in found["checks"]}


@pytest.mark.slow
def test_an_honest_network_passes_every_check() -> None:
    model, x = Curved().eval(), images()
    found = caught(model, x, labelled(model, x), Linear())
    assert set(found.values()) == {True}, found
    assert caught(model, x, labelled(model, x))["a transferred attack is weaker"] is None


@pytest.mark.slow
def test_masked_gradients_are_caught() -> None:
    """Each hides the same network in its own way; every one is caught by what sees that way, and by more than one check."""
    model, x = Curved().eval(), images()
    y = labelled(model, x)
    quantised = caught(Of(model, lambda z: (z * 2).round() / 2), x, labelled(Of(model, lambda z: (z * 2).round() / 2), x), model, 0.05)
    assert quantised["gradients do not vanish"] is False
    assert quantised["accuracy reaches chance"] is False
    assert quantised["black-box attack adds nothing"] is False
    assert quantised["a transferred attack is weaker"] is False
    saturated = caught(Of(model, lambda z: z * 1e4), x, y, model)
    assert saturated["gradients do not vanish"] is False
    assert saturated["a transferred attack is weaker"] is False
    shattered = caught(
        Of(model, lambda z: z + 5 * torch.sin(4e3 * z)), x, labelled(Of(model, lambda z: z + 5 * torch.sin(4e3 * z)), x), model
    )
    assert shattered["more steps and restarts do not help"] is False or shattered["black-box attack adds nothing"] is False
    probabilities = caught(Of(model, lambda z: z.softmax(1)), x, y)
    assert probabilities["logits, not probabilities"] is False
    assert probabilities["AutoAttack's own checks"] is False
    random = caught(Of(model, lambda z: z + 0.1 * torch.randn_like(z)), x, y)
    assert random["deterministic output"] is False
    assert random["AutoAttack's own checks"] is False


def test_limits_of_checks_are_points_of_accuracy() -> None:
    assert checks.Check.at_most("a", 0.98 - 0.97, 0.01, "").passed  # one point is one point
    assert not checks.Check.at_most("a", 0.0101, 0.01, "").passed
    assert checks.falls([(0, 0.9), (0.1, 0.5), (0.2, 0.505)]).passed
    assert not checks.falls([(0, 0.9), (0.1, 0.5), (0.2, 0.52)]).passed
    assert checks.reaches_chance([(0, 0.9), (0.5, 0.1)], 10).passed
    assert not checks.reaches_chance([(0, 0.9), (0.5, 0.11)], 10).passed
    protocol = settings(0.1).standard
    stands = {name: torch.ones(N, dtype=torch.int8) for name in protocol.attacks}
    verdicts = Verdicts(torch.zeros(N), torch.zeros(N), robust=stands, done=dict.fromkeys(stands, 1))
    assert checks.black_box(protocol, verdicts).passed
    stands["square"][0] = 0  # 1 of 24
    assert not checks.black_box(protocol, verdicts).passed
    assert checks.own_flags(protocol, verdicts).passed
    assert checks.own_flags(protocol.model_copy(update={"n": 0}), verdicts).passed is None  # nothing ran, nothing warned
    fewer = protocol.model_copy(update={"n": 4})
    assert checks.black_box(fewer, verdicts).value == 0.25


class Reading(nn.Module):
    """Digits, ten classes: by the nearest class mean. `read` is how it takes its images, `name` which output each class has."""

    def __init__(self, x: Tensor, y: Tensor, read: Any = lambda x: x, name: Any = lambda k: k, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((classes, x[0].numel()), 1e3))
        for k in y.unique().tolist():
            self.mean[name(k)] = x[y == k].flatten(1).mean(0)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.read(x).flatten(1), self.mean).square()


def digits_in_colour() -> tuple[Tensor, Tensor]:
    """200 test digits, each channel with a shading of its own."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images[:200]).float().div(16)[:, None]
    return torch.cat([grey, grey.flip(2) / 2, 1 - grey], 1), torch.from_numpy(bunch.target[:200])


def failing(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, str]:
    """Those of the checks of labels and images that fail, with what they say."""
    asked = settings(0.01, 0, checks={"n": 4, "steps": 20, "restarts": 1, "sweep": (1.0,)})
    names = ("above chance", "classes in the network's order", "images as the network reads them")
    found = [check for check in audit(model.eval(), x, y, asked).metrics["checks"] if check["name"] in names]
    assert len(found) == len(names)
    return {check["name"]: check["says"] for check in found if check["passed"] is False}


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (lambda x: ((x + 1) * 0.501).round(), "pixels in [-1, 1]"),  # of [0, 1] everything becomes 1
        (lambda x: x / 255, "pixels in [0, 255]"),
        (lambda x: x.flip(1), "channels in the reverse order (BGR)"),
        (lambda x: 1 - x, "inverted pixels"),
        (lambda x: x.transpose(2, 3), "rows as columns"),
    ],
)
def test_a_network_that_reads_images_otherwise_is_told(read: Any, told: str) -> None:
    x, y = digits_in_colour()
    assert failing(Reading(x, y), x, y) == {}
    says = failing(Reading(x, y, read), x, y)["images as the network reads them"]
    assert says == f"points of accuracy that another reading of the images adds: {told}"


TEXT = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]  # the numbers of 12 folders that were sorted as text


@pytest.mark.parametrize(
    ("name", "classes", "told"),
    [
        (lambda k: TEXT[k], 12, 'it looks as if numbers from 0 were sorted as text ("10" before "2") for the labels'),
        (TEXT.index, 12, 'it looks as if numbers from 0 were sorted as text ("10" before "2") for the network'),
        (lambda k: k + 1, 11, "it looks as if labels are counted from 0, the network's classes from 1"),
        (lambda k: 9 - k, 10, "it looks as if labels are in the reverse order"),
        (lambda k: {3: 5, 5: 3}.get(k, k), 10, "it looks as if label 3 is its 5, 5 is its 3"),
    ],
)
def test_a_network_with_its_classes_in_another_order_is_told(name: Any, classes: int, told: str) -> None:
    x, y = digits_in_colour()
    says = failing(Reading(x, y, name=name, classes=classes), x, y)["classes in the network's order"]
    mended = "; give the classes in the network's order"
    assert says == f"share of images that another order of the classes makes right: {told}{mended}"


def test_a_weak_network_is_above_chance_and_one_that_guesses_is_not() -> None:
    """No alarm for few images or classes, which tell nothing; an untrained network is no permutation."""
    rng, n = np.random.default_rng(0), 300

    def of(accuracy: float, classes: int, n: int, share: float = 0.0) -> list[str | bool | None]:
        y = rng.integers(0, classes, n)
        y[rng.random(n) < share] = 0
        prediction = np.where(rng.random(n) < accuracy, y, rng.permutation(y))
        verdicts = Verdicts(torch.from_numpy(y), torch.from_numpy(prediction), classes=classes)
        return [checks.above_chance(verdicts).passed, checks.classes_in_order(verdicts).passed]

    assert all(of(0.2, 10, n) == [True, True] for _ in range(20))
    assert all(of(0.4, 2, n) == [True, True] for _ in range(20))
    assert all(of(0.5, 2, n, 0.8) == [True, True] for _ in range(20))  # nine of ten of one class
    assert all(of(0.9, classes, size)[0] is not False for classes, size in ((2, 6), (3, 5), (10, 8), (2, 1)) for _ in range(20))
    guesses = [of(0.0, classes, n) for classes in (2, 10, 100) for _ in range(20)]
    assert sum(passed is False for passed, _ in guesses) >= 54  # p is 0.05
    assert all(order for _, order in guesses)
    constant = Verdicts(torch.arange(100) % 10, torch.zeros(100, dtype=torch.int64), classes=10)
    assert checks.above_chance(constant).passed is False
    turned = Verdicts(torch.arange(40) % 2, (torch.arange(40) + 1) % 2, classes=2)
    assert checks.above_chance(turned).passed is False
    assert checks.classes_in_order(turned).passed is False
    assert checks.above_chance(Verdicts(torch.zeros(50), torch.zeros(50), classes=2)).passed is None  # one class alone


def test_two_classes_that_are_confused_are_no_other_order() -> None:
    """Two of ten are taken for each other more often than told apart, and as often for anything else: no order makes most of them right."""
    y, prediction = (torch.arange(400) % 10 for _ in range(2))
    for k in (0, 1):
        rows = (y == k).nonzero().squeeze(1)
        prediction[rows] = torch.tensor([1 - k] * 18 + [k] * 2 + [2, 3, 4, 5, 6] * 4)[torch.arange(40).roll(k)]
    found = checks.classes_in_order(Verdicts(y, prediction, classes=10))
    assert (found.passed, found.value) == (True, 0.0)
    for k in (0, 1):  # three of four: an order
        prediction[(y == k).nonzero().squeeze(1)[:30]] = 1 - k
    found = checks.classes_in_order(Verdicts(y, prediction, classes=10))
    assert found.passed is False
    assert "label 0 is its 1, 1 is its 0; give the classes in the network's order" in found.says


def test_a_reading_under_which_the_most_frequent_class_is_guessed_is_no_better_one() -> None:
    """Bright images are class 0 to it, which six of ten are: many more right, and no more than by a guess."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = x.flatten(1).mean(1, keepdim=True) - 0.5
            return torch.cat([bright, -bright, -bright.abs() - 1, -bright.abs() - 1], 1)

    x, y = images(100) * 0.4, torch.arange(100) % 5
    y = (y - 2).clamp_min(0) + (y > 2)  # 0, 0, 0, 2, 3
    found = checks.usual_images(Constant(), x, y, settings(0.01))
    assert (found.passed, found.value) == (True, 0.0)


def test_the_best_order_is_that_of_a_dense_assignment() -> None:
    """Of all classes, seen or not; as many right as scipy's dense solver finds, and with the same classes left as they are."""
    rng = np.random.default_rng(0)
    for classes, n in ((2, 1), (3, 8), (5, 40), (12, 30), (40, 30), (40, 400)):
        for _ in range(20):
            y = rng.integers(0, classes, n)
            prediction = np.where(rng.random(n) < 0.5, rng.permutation(classes)[y], rng.integers(-1, classes, n))
            confusion = np.zeros((classes, classes))
            np.add.at(confusion, (y[prediction >= 0], prediction[prediction >= 0]), 1)
            worth = confusion + np.eye(classes) / 2
            best = linear_sum_assignment(worth, maximize=True)[1]
            found = checks._best_order(y, prediction, classes)
            assert sorted(found) == list(range(classes))
            assert worth[range(classes), found].sum() == worth[range(classes), best].sum()


def test_the_order_of_twenty_thousand_classes_is_found_in_seconds() -> None:
    classes = 21_000
    y = np.arange(2 * classes) % classes
    started = time.monotonic()
    assert checks._best_order(y, (y + 1) % classes, classes)[:3].tolist() == [1, 2, 3]
    assert time.monotonic() - started < 5  # a dense table of them takes 3.5 GB


def test_an_untrained_network_is_no_permutation() -> None:
    x, y = digits_in_colour()
    for seed in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
        assert "classes in the network's order" not in failing(model, x, y)
