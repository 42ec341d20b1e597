"""Verdicts against closed forms and plain pyautoattack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from ebjdat.evaluation import autoattack, checks, robust
from ebjdat.evaluation.verdicts import Verdicts, pgd_name, result
from ebjdat.intervals import wilson
from ebjdat.names import flat_results
from ebjdat.settings import AttackSettings, ProtocolSettings

from ..conftest import Linear
from ..networks import Curved, N, images, labelled, settings


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_not_finite_breaks_nothing(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    assert robust.ball_violation(x * torch.nan, x, "L2", 0.1).tolist() == [1.0] * N
    monkeypatch.setattr(autoattack, "square", lambda network, x, *_: x * torch.nan)
    verdicts = robust.evaluate(linear, x, labelled(linear, x, 0), "standard", settings(1e-4))
    assert verdicts.robust["square"].min() == 1
    assert verdicts.excess == 1.0
    assert not verdicts.lost.any()  # such an image is no image that the network lost


@pytest.mark.slow
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


def test_an_interrupted_pgd_goes_on_with_its_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Curved().eval(), images(40)
    y, asked, attack = labelled(model, x), settings(0.012, 0, batch_size=7), robust.pgd_batch
    whole = robust.evaluate(model, x, y, "standard", asked)
    calls: list[Any] = []

    def interrupting(*arguments: Any) -> Tensor:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return attack(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(robust, "pgd_batch", interrupting)
        with pytest.raises(KeyboardInterrupt):
            robust.evaluate(model, x, y, "standard", asked, tmp_path)
    assert torch.equal(robust.evaluate(model, x, y, "standard", asked, tmp_path).robust["pgd20"], whole.robust["pgd20"])


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


@pytest.mark.slow
def test_processes_that_share_the_batches_change_no_verdict(tmp_path: Path) -> None:
    model, x = Linear().eval(), images(40)
    y = labelled(model, x)
    asked = settings(0.012, 40, batch_size=12)
    alone = robust.evaluate(model, x, y, "quick", asked)
    shared = robust.evaluate(model, x, y, "quick", asked, tmp_path, workers=2)
    assert shared.done == alone.done
    assert all(torch.equal(alone.robust[name], shared.robust[name]) for name in alone.robust)
    assert shared.flags == alone.flags


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


def test_pgd_beside_the_ensemble_is_of_the_ensembles_examples() -> None:
    protocol, y = settings(0.012, 2).protocols["quick"], torch.zeros(4, dtype=torch.int64)
    attacked = {name: torch.tensor([1, 0, -1, -1], dtype=torch.int8) for name in protocol.attacks}
    pgd = torch.tensor([1, 0, 1, 1], dtype=torch.int8)
    stands = {pgd_name(protocol): pgd, **attacked}
    distances = dict.fromkeys(stands, torch.full((4, 2), torch.nan, dtype=torch.float64))
    found = result(protocol, Verdicts(y, y, robust=stands, classes=10, found=distances))
    assert found.ensemble is not None
    assert (found.ensemble.pgd.correct, found.ensemble.pgd.n, found.pgd.correct, found.pgd.n) == (1, 2, 3, 4)


def test_a_protocol_counts_restarts_as_the_worst_of_them() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    one = settings(0.012, 0)
    step = {"steps": 3, "step_size": 0.001}  # so short that it matters where they start
    several = {**one.protocols, "few": ProtocolSettings(eps=0.012, n=0, pgd=step, attacks={})}
    several["many"] = ProtocolSettings(eps=0.012, n=0, pgd={**step, "restarts": 4}, attacks={})
    asked = one.model_copy(update={"protocols": several})
    few, many = (robust.evaluate(model, x, y, name, asked).robust_under(["pgd3"]) for name in ("few", "many"))
    assert many.sum() <= few.sum()
    protocol = several["many"]
    starts = [robust.pgd_start(x, 0, protocol, asked.seed, restart) for restart in range(4)]
    each = torch.stack([model(robust.pgd_batch(model, x, y, protocol, start)).argmax(1) == y for start in starts])
    assert torch.equal(many, (model(x).argmax(1) == y) & each.all(0))
    assert (each.all(0) != each[-1]).any()  # some image withstands the last start alone
