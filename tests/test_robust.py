"""Verdicts against closed forms and plain pyautoattack; checks against networks whose gradients are masked on purpose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.fab_pt import FABAttack_PT
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ebjdat.evaluation import autoattack, checks, robust
from ebjdat.evaluation.audit import audit
from ebjdat.evaluation.verdicts import Verdicts, result
from ebjdat.intervals import mcnemar, wilson
from ebjdat.names import flat_results
from ebjdat.settings import AttackSettings, EnsembleSettings, ProtocolSettings

from .conftest import Linear

N = 24


class Curved(nn.Module):
    """A small smooth network of random weights."""

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 40), nn.Tanh(), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 0.5) * 4)


class Of(nn.Module):
    """A network whose logits are changed on the way out."""

    def __init__(self, network: nn.Module, change: Any) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.network(x))


def images(n: int = N, side: int = 4) -> Tensor:
    """Around mid grey, so that the box [0, 1] does not bind."""
    return 0.5 + 0.2 * (torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1)) - 0.5)


def settings(eps: float, n: int = N, **more: Any) -> AttackSettings:
    """The standard protocol at a radius, the released one with the same numbers, and the standard one with less effort ("quick")."""
    numbers = {"eps": eps, "pgd": {"step_size": eps / 4}, "n": n}
    few = {"steps": 20, "targets": 3}
    less = {"apgd_ce": {"steps": 20}, "apgd_t": few, "fab_t": few, "square": {"queries": 300}}
    protocols = {"standard": numbers, "released": numbers, "quick": {"like": "standard", "attacks": less, **numbers}}
    return AttackSettings.model_validate({"protocols": protocols, "checks": {"n": n or N}, "batch_size": 64} | more)


def labelled(model: nn.Module, x: Tensor, wrong: int = 4) -> Tensor:
    """The model's own classes, but for the last few."""
    with torch.no_grad():
        y = model(x).argmax(1)
    y[len(x) - wrong :] = (y[len(x) - wrong :] + 1) % 10
    return y


@pytest.fixture
def linear() -> Linear:
    return Linear().eval()


def test_verdicts_are_exactly_those_of_a_linear_network(linear: Linear) -> None:
    x = images()
    y = labelled(linear, x)
    radius = linear.robust_radius(x, y).detach()
    ordered = radius[radius > 0].sort().values
    eps = float((ordered[8] + ordered[9]) / 2)  # a radius between two examples: no ties
    assert 0.005 < eps < 0.3
    asked = settings(eps)
    verdicts = robust.evaluate(linear, x, y, "standard", asked)
    assert torch.equal(verdicts.robust_under(list(asked.standard.attacks)), radius > eps)
    found = flat_results({"standard": result(asked.standard, verdicts).statistics()})
    assert (found["clean_correct"], found["autoattack_correct"]) == (20, 11)
    assert 11 <= found["pgd20_correct"] <= 14  # cross-entropy does not aim at the nearest class
    assert (found["autoattack_acc"], found["clean_acc"]) == (11 / N, 20 / N)
    assert (found["autoattack_low"], found["autoattack_high"]) == wilson(11, N)
    assert (found["n_test"], found["n_attack"], found["radius"]) == (N, N, eps)
    assert verdicts.excess <= 1e-6


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.012), ("L2", 0.035)])
def test_verdicts_are_those_of_plain_pyautoattack(norm: str, eps: float) -> None:
    """Its own run_standard_evaluation, with the same seed and batches, on a network that is not linear."""
    side = 4 if norm == "Linf" else 6  # Square needs 5 pixels for L2
    model, x = Curved(side).eval(), images(40, side)
    y = labelled(model, x)
    protocol = {"norm": norm, "eps": eps, "pgd": {"step_size": eps / 4}, "n": 40}
    fewer = {**protocol, "like": "standard", "attacks": {"square": {"queries": 600}}}  # at 5,000 the test takes a minute
    protocols = {"standard": {**protocol, "norm": "Linf", "n": 0}, "fewer": fewer}
    asked = AttackSettings.model_validate({"protocols": protocols, "batch_size": 40})
    plain = AutoAttack(model, norm=norm, eps=eps, seed=0, version="standard")
    plain.square.n_queries = 600
    adversarial, _ = plain.run_standard_evaluation(x, y, batch_size=40)
    expected = robust.predictions(model, adversarial, 40) == y
    verdicts = robust.evaluate(model, x, y, "fewer", asked)
    found = verdicts.robust_under(list(asked.standard.attacks))
    assert 5 < int(expected.sum()) < 31
    assert torch.equal(found, expected)


def test_apgd_stops_working_on_what_is_broken() -> None:
    model, x = Curved().eval(), images()
    y = labelled(model, x, wrong=0)
    protocol = settings(0.02).standard
    shown = {"ours": 0, "plain": 0}

    class Counted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.network = name, model

        def forward(self, x: Tensor) -> Tensor:
            shown[self.name] += len(x)
            return self.network(x)

    network = autoattack.FastNetwork(model, x)
    network.count = lambda n: shown.__setitem__("ours", shown["ours"] + n)
    found = autoattack.apgd_ce(network, x, y, EnsembleSettings(steps=100), protocol, 0)
    plain = AutoAttack(Counted("plain"), eps=protocol.eps, seed=0).apgd
    plain.n_restarts = 1
    expected = plain.perturb(x, y)
    broken = robust.predictions(model, expected, N) != y
    assert broken.float().mean() > 0.5
    assert torch.equal(robust.predictions(model, found, N) != y, broken)
    assert float((found - x).abs().max()) <= protocol.eps + 1e-6
    assert shown["ours"] < 0.7 * shown["plain"]


def test_a_fast_network_is_the_same_function() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 10)),
        torch.rand(9, 3, 6, 6),
    )
    model[1].running_mean.uniform_(-1, 1)
    model.eval()
    fast = autoattack.FastNetwork(model, x)
    fast.at_once = 4  # in parts
    points = x.clone().requires_grad_(True)
    mine, theirs = (torch.autograd.grad(m(points).square().sum(), points)[0] for m in (fast, model))
    assert torch.allclose(fast(x), model(x), atol=1e-6)
    assert torch.allclose(mine, theirs, atol=1e-4)
    assert mine.is_contiguous()
    assert all(p.requires_grad for p in model.parameters())
    rough = autoattack.FastNetwork(model, x, bf16=True)
    many = torch.rand(300, 3, 6, 6)
    with torch.no_grad():
        assert rough._logits(many, True).sub(model(many)).abs().max() > 1e-4  # bf16 it is
        assert torch.equal(rough(many).argmax(1), model(many).argmax(1))


class Viewing(nn.Module):
    """Flattens with `view`, as many networks do: it cannot be run in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        return self.head(h.view(len(h), -1))


def test_a_network_that_needs_its_layout_keeps_it() -> None:
    model, x = Viewing().eval(), images(12)
    with pytest.raises(RuntimeError, match="view"):
        Viewing().to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    fast = autoattack.FastNetwork(model, x)
    assert torch.allclose(fast(x), model(x), atol=1e-6)
    verdicts = robust.evaluate(model, x, labelled(model, x, 2), "quick", settings(0.012, 12))
    assert set(verdicts.robust) == {"pgd20", "apgd_ce", "apgd_t", "fab_t", "square"}


def test_bf16_search_leaves_verdicts_to_fp32() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    fp32 = robust.evaluate(model, x, y, "quick", settings(0.012, 40))
    bf16 = robust.evaluate(model, x, y, "quick", settings(0.012, 40, search="bf16"))
    names = ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert (bf16.robust_under(names) != fp32.robust_under(names)).sum() <= 1  # of 40: another search, the same judge
    with_all = bf16.robust_under(names)
    assert with_all[~fp32.robust_under(names)].sum() <= 1


def test_released_fab_works_in_the_brighter_half_alone(linear: Linear) -> None:
    """As in pyautoattack on [-1, 1] images: its box cuts below mid grey, so that dark images are never broken by it."""
    eps = 0.08
    released = settings(2 * eps).protocols["released"]
    for x in (images(), images() * 0.4, 0.3 + images()):
        y = labelled(linear, x, wrong=0)
        common = {"norm": "Linf", "eps": 2 * eps, "n_iter": 20, "seed": 0, "device": torch.device("cpu")}
        reference = FABAttack_PT(lambda z: linear((z + 1) / 2), targeted=True, n_target_classes=9, **common)
        expected = (reference.perturb(2 * x - 1, y) + 1) / 2
        network = autoattack.FastNetwork(linear, x)
        found = autoattack.fab_t(network, x, y, released.attacks["fab_t"], released, 0)
        assert torch.allclose(found, expected, atol=1e-6)
    dark = images() * 0.4
    fab_t = released.attacks["fab_t"]
    found = autoattack.fab_t(autoattack.FastNetwork(linear, dark), dark, labelled(linear, dark, 0), fab_t, released, 0)
    assert torch.equal(found, dark)
    bright = 0.3 + images()
    y = labelled(linear, bright, wrong=0)
    found = autoattack.fab_t(autoattack.FastNetwork(linear, bright), bright, y, fab_t, released, 0)
    assert (robust.predictions(linear, found, N) != y).any()


def test_released_protocol_adds_its_noise_and_halves_the_radius(linear: Linear) -> None:
    x = torch.rand(2000, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    asked = settings(0.1)
    released = asked.protocols["released"]
    seen = robust.apply_protocol_noise(released, x, 0)
    assert float((seen - x).std()) == pytest.approx(0.015, rel=0.02)  # 0.03 in [-1, 1]
    assert float(seen.min()) < 0  # not clamped
    assert torch.equal(seen, robust.apply_protocol_noise(released, x, 0))
    assert robust.apply_protocol_noise(asked.standard, x, 0) is x
    assert robust.apply_protocol_noise(asked.on("sadajem").protocols["released"], x, 0) is x
    assert torch.equal(robust.apply_protocol_noise(asked.on("jempp").protocols["released"], x, 0), seen)
    moved = robust.pgd_examples(linear, seen, torch.zeros(2000, dtype=torch.int64), released, 0, 500)
    assert float((moved - seen.clamp(0, 1)).abs().max()) == pytest.approx(0.05, abs=1e-6)
    assert (float(moved.min()), float(moved.max())) == (0, 1)
    verdicts = robust.evaluate(linear, x[:N], labelled(linear, x[:N]), "released", asked)
    assert torch.equal(verdicts.prediction, linear(seen[:N]).argmax(1))
    assert set(verdicts.robust) == {"pgd20", "apgd_ce", "apgd_dlr", "fab_t", "square"}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_outside_measures_how_far_an_image_left_its_ball(norm: str) -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    one = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert robust.ball_violation(x + 0.1 * one, x, norm, 0.1).max() < 1e-6
    assert robust.ball_violation(x + 0.101 * one, x, norm, 0.1).tolist() == pytest.approx([0.001, 0.001], abs=1e-6)
    everywhere = robust.ball_violation(x + 0.06, x, norm, 0.1)  # L2 length 0.12
    assert everywhere.tolist() == pytest.approx([0.0 if norm == "Linf" else 0.02] * 2, abs=1e-6)
    assert robust.ball_violation(torch.full_like(x, 1.001), torch.ones_like(x), norm, 0.1).tolist() == pytest.approx([0.001] * 2, abs=1e-6)
    assert robust.ball_violation(torch.zeros_like(x), torch.full_like(x, -0.02), norm, 0.01).max() == 0  # noise had left [0, 1]


def test_an_attack_that_leaves_its_ball_breaks_nothing_and_fails_a_check(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    y = labelled(linear, x, wrong=0)

    def far(network: nn.Module, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        return 1 - x  # classified otherwise, and far away

    monkeypatch.setattr(autoattack, "square", far)
    asked = settings(1e-4)
    verdicts = robust.evaluate(linear, x, y, "standard", asked)
    assert verdicts.robust["square"].min() == 1
    check = checks.inside(asked.standard, verdicts)
    assert (check.passed, check.value) == (False, pytest.approx(float((1 - 2 * x).abs().max()) - 1e-4, rel=1e-3))


def test_what_is_not_finite_breaks_nothing(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    assert robust.ball_violation(x * torch.nan, x, "L2", 0.1).tolist() == [1.0] * N
    monkeypatch.setattr(autoattack, "square", lambda network, x, *_: x * torch.nan)
    verdicts = robust.evaluate(linear, x, labelled(linear, x, 0), "standard", settings(1e-4))
    assert verdicts.robust["square"].min() == 1
    assert verdicts.excess == 1.0
    assert not verdicts.lost.any()  # such an image is no image that the network lost


def test_state_of_another_network_or_radius_is_not_continued(tmp_path: Path) -> None:
    first, second, x = Curved().eval(), Linear().eval(), images(40)
    y = labelled(first, x)
    for model, eps in ((first, 0.012), (second, 0.012), (second, 0.02)):
        fresh = robust.evaluate(model, x, y, "quick", settings(eps, 40))
        found = robust.evaluate(model, x, y, "quick", settings(eps, 40), tmp_path)
        assert torch.equal(found.prediction, fresh.prediction)
        assert all(torch.equal(found.robust[name], fresh.robust[name]) for name in fresh.robust)


def test_batches_and_restarts_of_pgd_hit_their_own_examples() -> None:
    """PGD's verdict on each example, computed here image by image for a linear network, where cross-entropy has one maximum."""
    model, x = Curved().eval(), images(40)
    y = labelled(model, x, 8)
    asked = settings(0.012, 0, batch_size=7)
    verdicts = robust.evaluate(model, x, y, "standard", asked)
    moved = robust.pgd_examples(model, x, y, asked.standard, asked.seed, 7)
    expected = (model(moved).argmax(1) == y) & (model(x).argmax(1) == y)
    assert torch.equal(verdicts.robust_under(["pgd20"]), expected)
    assert 3 < int(expected.sum()) < 30


def test_attacks_leave_torchs_generator_as_it_was(linear: Linear) -> None:
    x = images(8)
    before = torch.get_rng_state()
    robust.evaluate(linear, x, labelled(linear, x, 0), "quick", settings(0.02, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_more_is_asked_for_than_there_is(linear: Linear) -> None:
    x = images(8)
    asked = settings(0.02, 50)
    asked = asked.model_copy(update={"protocols": {"standard": settings(0.02, 0).standard, "quick": asked.protocols["quick"]}})
    found = audit(linear, x, labelled(linear, x, 0), asked, with_checks=False)
    assert found.metrics["quick_n_attack"] == 8
    empty = asked.protocols["quick"].model_copy(update={"attacks": {}})
    found = audit(
        linear, x, labelled(linear, x, 0), asked.model_copy(update={"protocols": {**asked.protocols, "quick": empty}}), with_checks=False
    )
    assert "quick_autoattack_acc" not in found.metrics
    assert found.table.to_pandas().query("protocol == 'quick'")["autoattack"].isna().all()


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    asked = settings(0.012, 35, batch_size=12)
    whole = robust.evaluate(model, x, y, "quick", asked)
    calls: list[str] = []
    budget = 0

    def interrupting(name: str, attack: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            if len(calls) == budget:
                raise KeyboardInterrupt
            calls.append(name)
            return attack(*arguments)

        return call

    for name in asked.protocols["quick"].attacks:
        monkeypatch.setattr(autoattack, name, interrupting(name, getattr(autoattack, name)))
    stops = 0
    for budget in (1, 1, 2, 100):  # noqa: B007 (read by the attacks): each time a few batches further
        calls.clear()
        try:
            resumed = robust.evaluate(model, x, y, "quick", asked, tmp_path)
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    assert 0 < len(calls) < sum(whole.done.values()) - whole.done["pgd20"]  # the last call did the rest alone
    assert whole.robust.keys() == resumed.robust.keys()
    assert all(torch.equal(whole.robust[name], resumed.robust[name]) for name in whole.robust)
    assert whole.done == resumed.done
    again = robust.evaluate(model, x, y, "quick", asked, tmp_path)
    assert torch.equal(again.robust["square"], whole.robust["square"])
    assert len(calls) < 100


def test_processes_that_share_the_batches_change_no_verdict(tmp_path: Path) -> None:
    model, x = Linear().eval(), images(40)
    y = labelled(model, x)
    asked = settings(0.012, 40, batch_size=12)
    alone = robust.evaluate(model, x, y, "quick", asked)
    shared = robust.evaluate(model, x, y, "quick", asked, tmp_path, workers=2)
    assert shared.done == alone.done
    assert all(torch.equal(alone.robust[name], shared.robust[name]) for name in alone.robust)
    assert shared.flags == alone.flags


def caught(model: nn.Module, x: Tensor, y: Tensor, source: nn.Module | None = None, eps: float = 0.012) -> dict[str, bool | None]:
    """Check -> passed; those of a protocol: of the quick one, with its ensemble on every image."""
    asked = settings(eps)
    asked = asked.model_copy(update={"protocols": {"standard": settings(eps, 0).standard, "quick": asked.protocols["quick"]}})
    found = audit(model, x, y, asked, source).metrics
    assert found["checks_failed"] == sum(check["passed"] is False for check in found["checks"])
    return {check["name"]: check["passed"] for check in found["checks"]}


def test_an_honest_network_passes_every_check() -> None:
    model, x = Curved().eval(), images()
    found = caught(model, x, labelled(model, x), Linear())
    assert set(found.values()) == {True}, found
    assert caught(model, x, labelled(model, x))["a transferred attack is weaker"] is None


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


def test_two_and_three_classes_have_a_protocol_of_their_own() -> None:
    """Verdicts in closed form, with the attacks of the row but less effort; with more classes, targets are all others."""
    n = 12
    x, few, steps = images(n), {"square": {"queries": 50}}, {"steps": 10}
    for classes in (2, 3, 5):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
        with torch.no_grad():
            model[1].weight.copy_(Linear().weight[:classes])
            model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
        y = model(x).argmax(1)
        weight = model[1].weight.detach()
        margins = model(x).detach()[range(n), y][:, None] - model(x).detach()
        lengths = (weight[y][:, None] - weight[None]).abs().sum(2)
        radius = (margins / lengths.clamp_min(1e-9)).masked_fill(lengths == 0, torch.inf).amin(1)
        eps = float(radius.sort().values[n // 2 - 1 : n // 2 + 1].mean())  # half of the images stand, for certain
        near = ((radius - eps).abs() < 0.01 * eps).sum()
        protocol = {"eps": eps, "pgd": {"step_size": eps / 4}, "n": n}
        like, own = ("standard_binary", ("apgd_ce", "fab")) if classes < 4 else ("standard", ("apgd_ce", "apgd_t", "fab_t"))
        row = {"like": like, **protocol, "attacks": {**few, **dict.fromkeys(own, steps)}}
        asked = AttackSettings.model_validate({"protocols": {"standard": {**protocol, "n": 0}, "own": row}})
        assert list(asked.protocols["own"].attacks) == [*own, "square"]
        found = audit(model, x, y, asked, with_checks=False)
        assert abs(found.metrics["own_autoattack_correct"] - n // 2) <= near < n // 4
        assert found.metrics["own_n_targets"] == ({} if classes < 4 else {"apgd_t": 4, "fab_t": 4})
    with pytest.raises(ValueError, match="standard_binary: norm, range, noise"):
        AttackSettings.model_validate({"protocols": {"standard": protocol, "standard_binary": {**protocol, "norm": "L2"}}})


def test_autoattacks_own_word_on_square_is_heard() -> None:
    assert autoattack.square_flag({"clean": 0.9, "apgd_ce": 0.8, "square": 0.8}) == []
    (told,) = autoattack.square_flag({"clean": 0.9, "apgd_ce": 0.8, "square": 0.7})
    assert "Square Attack has decreased the robust accuracy of 10.00%" in told
    model, x = Of(Curved().eval(), lambda z: (z * 2).round() / 2), images()
    verdicts = robust.evaluate(model, x, labelled(model, x), "quick", settings(0.05))
    assert any("Square Attack has decreased" in text for text in verdicts.flags)
    assert any("zero gradient" in text for text in verdicts.flags)


def test_evaluation_is_in_eval_mode_fp32_and_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.Dropout(0.5)).to(torch.bfloat16).train()
    with torch.no_grad():
        model[1].weight *= 20
    x = images()
    asked = settings(0.02, 0)
    before = [p.clone() for p in model.parameters()]
    first = robust.evaluate(model, x, torch.zeros(N, dtype=torch.int64), "standard", asked)
    with torch.autocast("cpu", torch.bfloat16):
        again = robust.evaluate(model, x, torch.zeros(N, dtype=torch.int64), "standard", asked)
    assert torch.equal(first.prediction, again.prediction)
    with torch.no_grad():
        exact = x.flatten(1) @ model[1].weight.float().T + model[1].bias.float()
    assert torch.equal(first.prediction, exact.argmax(1))
    assert model.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
            "'standard': apgd_t needs at least 4 classes, here are 3; set its n to 0; .*works protocols.standard_binary={eps: 0.01, ",
        ),
        (nn.Identity(), "logits of shape"),
        (Of(Linear(), lambda z: (z, z)), "returned tuple for one image"),
        (Of(Linear(), lambda z: z / 0), "not finite"),
        (Of(Linear(), lambda z: z.detach()), "passes no gradient on to its input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), "labels go up to 9, but the network has 5 classes"),
    ],
)
def test_networks_that_cannot_be_evaluated_are_refused(model: nn.Module, message: str) -> None:
    y = torch.arange(N) % (10 if "9" in message else 3)
    with pytest.raises(robust.AttackError, match=message):
        robust.evaluate(model, images(), y, "standard", settings(0.01))


def test_every_figure_can_be_recomputed_from_the_verdicts() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    asked = settings(0.012, 30)
    asked = asked.model_copy(
        update={"protocols": {"standard": settings(0.012, 0).standard, **{k: asked.protocols[k] for k in ("quick", "released")}}}
    )
    found = audit(model, x, y, asked, with_checks=False)
    frame = found.table.to_pandas()
    for name, prefix in (("quick", "quick_"), ("released", "released_")):
        mine = frame[frame["protocol"] == name]
        attacks = list(asked.protocols[name].attacks)
        assert mine["index"].tolist() == list(range(40))
        assert mine["label"].tolist() == y.tolist()
        assert found.metrics[f"{prefix}clean_correct"] == (mine["prediction"] == mine["label"]).sum() == mine["clean"].sum()
        assert found.metrics[f"{prefix}pgd20_correct"] == mine["pgd20"].fillna(value=False).sum()
        first = mine[mine["index"] < 30]
        standing = first["clean"].copy()
        for attack in attacks:
            assert (first[attack].isna() | standing).all()  # only what stood was attacked
            standing &= first[attack].fillna(value=True).astype(bool)
            assert found.metrics[f"{prefix}after_{attack}_correct"] == standing.sum()
        assert found.metrics[f"{prefix}autoattack_correct"] == standing.sum() == first["autoattack"].sum()
        assert mine["autoattack"][mine["index"] >= 30].isna().all()
        whole = mine["pgd20"].fillna(value=False).astype(bool) & mine["autoattack"].fillna(value=True).astype(bool)
        assert (mine["worst"] == whole).all()


def test_intervals_and_tests_by_hand() -> None:
    z, n, p = 1.959963985, 50, 0.3
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(15, 50) == pytest.approx((centre - half, centre + half))
    a, b = [True] * 10 + [False] * 2 + [True] * 30, [False] * 10 + [True] * 2 + [True] * 30
    only_a, only_b, p_value = mcnemar(a, b)
    assert (only_a, only_b) == (10, 2)
    assert p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(a, a) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="the same examples"):
        mcnemar(a, b[1:])


def test_a_protocol_counts_restarts_as_the_worst_of_them() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    one = settings(0.012, 0)
    step = {"steps": 3, "step_size": 0.012}
    several = {**one.protocols, "few": ProtocolSettings(eps=0.012, n=0, pgd=step, attacks={})}
    several["many"] = ProtocolSettings(eps=0.012, n=0, pgd={**step, "restarts": 4}, attacks={})
    asked = one.model_copy(update={"protocols": several})
    few, many = (robust.evaluate(model, x, y, name, asked).robust_under(["pgd3"]) for name in ("few", "many"))
    assert not (many & ~few).any()
    assert many.sum() <= few.sum()
