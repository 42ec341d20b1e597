"""Logits that are not finite: no class, counted, and never treated as numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebjdat.errors import AttackError
from ebjdat.evaluation import autoattack, checks, detection, fidelity, frechet, generate, robust
from ebjdat.evaluation import energy as landscapes
from ebjdat.evaluation.audit import audit
from ebjdat.evaluation.verdicts import result
from ebjdat.files import read_json, write_json
from ebjdat.models.logits import NO_CLASS
from ebjdat.names import flat_results
from ebjdat.settings import AttackSettings

from ..conftest import Linear

N = 40


EPS = 0.008


class Lossy(nn.Module):
    """Linear, without finite logits where an image's first pixel is beyond these values; `score` is what stands there instead."""

    def __init__(self, above: float, score: float = math.nan, below: float = 0.0) -> None:
        super().__init__()
        self.network, self.above, self.score, self.below = Linear(), above, score, below

    def forward(self, x: Tensor) -> Tensor:
        lost = (x[:, 0, 0, 0] > self.above) | (x[:, 0, 0, 0] < self.below)
        return self.network(x).masked_fill(lost[:, None], self.score)


def images() -> Tensor:
    """First pixel 0.4, but 0.6 for the first three."""
    x = 0.5 + 0.2 * (torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    x[:, 0, 0, 0] = 0.4
    x[:3, 0, 0, 0] = 0.6
    return x


def settings(eps: float = EPS) -> AttackSettings:
    """Every attack there is, with little effort."""
    few = {"steps": 10, "targets": 3}
    one = {"like": "standard", "eps": eps, "pgd": {"step_size": eps / 4}, "n": N}
    attacks = {"apgd_ce": {"steps": 10}, "apgd_t": few, "fab_t": few, "square": {"queries": 100}}
    others = {"apgd_dlr": {"steps": 10}, "fab": {"steps": 10}, "apgd_ce": None, "apgd_t": None, "fab_t": None, "square": None}
    protocols = {"standard": {**one, "like": None, "n": 0}, "quick": {**one, "attacks": attacks}, "others": {**one, "attacks": others}}
    return AttackSettings.model_validate({"protocols": protocols, "batch_size": 16, "checks": {"n": N, "steps": 20, "restarts": 1}})


@pytest.mark.slow
@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_few_such_images_are_wrong_under_every_attack_whatever_their_label(score: float) -> None:
    """Three images of class 0, which argmax would call right. Everything is as where the network is wrong on them."""
    x, model = images(), Lossy(0.5, score).eval()
    y = model.network(x).argmax(1)
    wrong, y[:3] = torch.cat([(y[:3] + 1) % 10, y[3:]]), 0
    found, whole = audit(model, x, y, settings()), audit(model.network, x, wrong, settings(), with_checks=False)
    frame, other = found.table.to_pandas(), whole.table.to_pandas()
    for prefix, name in (("", "standard"), ("quick_", "quick"), ("others_", "others")):
        assert found.metrics[f"{prefix}n_not_finite"] == 3
        assert found.metrics[f"{prefix}n_not_finite_adversarial"] == 0  # the first pixel does not get that far
        assert found.metrics[f"{prefix}clean_correct"] == N - 3 == whole.metrics[f"{prefix}clean_correct"]
        mine = frame[frame["protocol"] == name]
        assert mine["prediction"][:3].tolist() == [NO_CLASS] * 3
        assert not mine["worst"][:3].any()
        assert mine["worst"].sum() == other[other["protocol"] == name]["worst"].sum() > 0
    assert found.metrics["quick_autoattack_correct"] == whole.metrics["quick_autoattack_correct"] < N - 3
    failed = {(check["name"], check["protocol"]) for check in found.metrics["checks"] if check["passed"] is False}
    others = {(name, protocol) for name, protocol in failed if name != "logits are finite"}
    assert failed - others == {("logits are finite", name) for name in ("standard", "quick", "others")}
    assert others <= {("AutoAttack's own checks", name) for name in ("quick", "others")}  # points without gradient, with few steps
    (check,) = (c for c in found.metrics["checks"] if c["name"] == "logits are finite" and c["protocol"] == "quick")
    assert (check["value"], check["limit"]) == (3 / N, 0.0)


@pytest.mark.parametrize("attack", ["apgd_ce", "apgd_dlr", "apgd_t", "fab", "fab_t", "square"])
def test_an_attack_that_meets_such_logits_breaks_the_image(attack: str) -> None:
    """The ball gives NaN but for its middle, and no point of it another class. An image of class 0 is no exception."""
    x, model = images()[3:], Lossy(0.401, below=0.399).eval()
    far = model.network.robust_radius(x, model.network(x).argmax(1)) > 2.1e-3
    x = x[far]
    y = model.network(x).argmax(1)
    protocol = settings(2e-3).protocols["quick"]
    few = settings().protocols["others" if attack in ("fab", "apgd_dlr") else "quick"].attacks[attack]
    with robust.fp32_eval_copy(model) as judge:
        network = autoattack.FastNetwork(judge, x)
        moved = getattr(autoattack, attack)(network, x, y, few, protocol, 0)
        prediction = robust.predictions(judge, moved, N)
    assert torch.isfinite(moved).all()
    assert robust.ball_violation(moved, x, "Linf", 2e-3).max() < robust.SLACK
    if attack in ("square", "apgd_ce", "apgd_dlr", "apgd_t"):  # FAB walks towards a class, and meets no NaN on this way
        assert (y == 0).any()
        assert (prediction == NO_CLASS).all()


def test_an_adversarial_image_without_finite_logits_is_broken_and_counted() -> None:
    """Half of all starts of PGD lie where the logits are NaN: there it stays, where it would have gone to NaN pixels."""
    x, model = images()[3:], Lossy(0.4005).eval()
    y = model.network(x).argmax(1)
    verdicts = robust.evaluate(model, x, y, "quick", settings(2e-3))
    found = flat_results({"quick": result(settings(2e-3).protocols["quick"], verdicts).statistics()})
    broken = N - 3 - found["quick_pgd20_correct"]
    assert verdicts.excess <= robust.SLACK
    assert found["quick_n_not_finite"] == 0
    assert found["quick_n_not_finite_adversarial"] >= broken - 3 > 10
    assert checks.finite(settings().protocols["quick"], verdicts).passed is False


def test_state_keeps_what_was_counted(tmp_path: Path) -> None:
    x, model = images(), Lossy(0.4005).eval()
    x[3:, 0, 0, 0], y = 0.4, model.network(x).argmax(1)
    first = robust.evaluate(model, x, y, "quick", settings(2e-3), tmp_path)
    again = robust.evaluate(model, x, y, "quick", settings(2e-3), tmp_path)
    assert again.done == first.done
    assert first.lost.any()
    assert torch.equal(again.lost, first.lost)
    assert again.classes == 10


def test_autoattacks_own_checks_do_not_see_such_images() -> None:
    """A comparison with NaN says nothing: with three such images first, probabilities would pass for logits."""
    x, model = images(), Lossy(0.5).eval()
    with torch.no_grad():
        y = model.network(x).argmax(1)

    class Probable(Lossy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    verdicts = robust.evaluate(Probable(0.5).eval(), x, y, "quick", settings())
    assert (verdicts.prediction[:3] == NO_CLASS).all()
    assert any("probability distribution" in text for text in verdicts.flags)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_such_a_point_is_noted_where_it_lies_in_the_ball_and_in_the_box(norm: str) -> None:
    protocol = settings(0.01).protocols["quick"].model_copy(update={"norm": norm})
    x = torch.stack([torch.full((1, 4, 4), value) for value in (0.001, 0.5, 0.999)])
    for step, rows in ((0.002, [0, 1]), (-0.002, [1, 2]), (0.02, []), (-0.0009, [0, 1, 2])):
        noting = autoattack._NoteNotFinite(lambda points: torch.full((len(points), 10), math.nan), x, protocol)
        assert noting(x + step).eq(0).all()
        assert sorted(noting.noted) == rows
        assert torch.equal(noting.merged(x) != x, torch.tensor([row in rows for row in range(3)]).view(3, 1, 1, 1).expand_as(x))


def test_more_than_a_tenth_is_refused_before_anything_is_attacked() -> None:
    x, model = images(), Lossy(0.5).eval()
    x[:5, 0, 0, 0] = 0.6
    y = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(AttackError, match=r"not finite for 5 of 40 images \(protocol 'standard'\); with more than 10%"):
        audit(model, x, y, settings())


def test_figures_that_such_values_take_part_in_are_none() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
    bad[4, 1] = math.nan
    assert detection.finite_rows(good, bad).tolist() == [i != 4 for i in range(30)]
    assert all(math.isnan(value) for value in detection.separation(good[:, 0], bad[:, 1], "a").values())
    assert 0 <= detection.separation(good[:, 0], bad[:, 0], "a")["a"] <= 1
    assert math.isnan(frechet.frechet_distance(good, bad))
    features = frechet.Features(lambda x: good, lambda x: x)
    found = fidelity.compare(bad, good, "reference", features)
    assert all(found[name] is None for name in ("inception_score", "inception_score_std"))
    assert all(math.isnan(value) for name, value in found.items() if not name.startswith("inception"))
    found = landscapes.landscape(good[:, 0], bad[:, 1], good[:, 2])
    assert found["n_energy_not_finite"] == 1
    assert {name for name, value in found.items() if math.isnan(value)} == {
        *(f"energy_{kind}_adversarial" for kind in ("gap", "shift", "overlap", "wasserstein")),
        *("energy_adversarial", "energy_gap_adversarial_se"),
    }


def test_images_without_a_class_are_not_the_surest_of_one() -> None:
    uint8 = (images() * 255).round().byte()
    kept = generate.most_confident(Lossy(0.5).eval(), uint8, 1.0, 16)
    assert sorted(kept.tolist()) == list(range(3, N))


def test_chains_that_end_in_no_image_have_no_distance(network: Any, pool: Any, digits: Any, profile: Any) -> None:
    with torch.no_grad():
        network.head.bias += math.nan
    asked = profile.evaluation.generate.model_copy(update={"n": 6, "steps": 1, "batch_size": 3})
    chain = profile.training_settings("eb_jdat").chain
    chain = chain.model_copy(update={"sampler": "sgld", "mode": "eval"})
    fresh, starts = generate.fresh_chains(network, pool, chain, asked)
    assert (fresh.lost, starts.lost) == (6, 0)
    features = frechet.Features(lambda x: x.flatten(1).double().numpy(), lambda x: x[:, :10])
    real = {name: features(torch.from_numpy(digits.images[:50])) for name in ("train", "all")}
    result = generate.measure(network, {"fresh": fresh, "conditional": starts, "buffer": None}, starts, real, "reference", features, asked)
    assert result["n_chains_not_finite"] == 6
    assert math.isnan(result["frechet"])
    assert result["class_agreement"] == 0


def test_json_says_which_values_were_not_finite(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": 1.5, "c": {"d": [1.0, -math.inf], "e": np.float64("inf")}, "checks": [{"value": math.nan, "n": 2}]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {
        "a": None,
        "b": 1.5,
        "c": {"d": [1.0, None], "e": None, "not_finite": ["d", "e"]},
        "checks": [{"value": None, "n": 2, "not_finite": ["value"]}],
        "not_finite": ["a"],
    }
    write_json(tmp_path / "y.json", {"a": (1, 2.0)})
    assert read_json(tmp_path / "y.json") == {"a": [1, 2.0]}
