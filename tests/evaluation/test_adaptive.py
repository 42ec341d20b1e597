"""The energy-aware attack against a loop written out, and beside an ensemble."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import generator
from ebjdat.evaluation import adaptive, robust
from ebjdat.evaluation.audit import audit
from ebjdat.evaluation.autoattack import FastNetwork
from ebjdat.intervals import wilson
from ebjdat.samplers.pgd import random_point
from ebjdat.settings import AdaptiveSettings, AttackSettings, ProtocolSettings

from ..conftest import Linear
from ..networks import Curved, Of, images, labelled, settings

EPS = 0.012


def protocol(norm: str = "Linf", eps: float = EPS) -> ProtocolSettings:
    own = {"like": "standard", "norm": norm, "eps": eps, "pgd": {"step_size": eps / 4}, "n": 0}
    return AttackSettings.model_validate({"protocols": {"standard": {**own, "norm": "Linf"}, "own": own}}).protocols["own"]


def found(model: nn.Module, x: Tensor, y: Tensor, asked: ProtocolSettings, **values: float) -> Tensor:
    chosen = AdaptiveSettings.model_validate({"steps": 20, **values})
    return adaptive.energy_ce(FastNetwork(model, x), x, y, chosen, asked, 3)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_it_returns_misclassified_images_of_the_ball_and_leaves_the_others(norm: str) -> None:
    """Bit for bit. Of 40 images it finds some, and not all, at a radius between their own."""
    model, x = Curved().eval(), images(40)
    y, asked = labelled(model, x, 0), protocol(norm, EPS if norm == "Linf" else 0.035)
    moved = found(model, x, y, asked)
    changed = (moved != x).flatten(1).any(1)
    assert 5 < int(changed.sum()) < 35
    assert (model(moved)[changed].argmax(1) != y[changed]).all()
    assert torch.equal(moved[~changed], x[~changed])
    assert float(robust.ball_violation(moved, x, norm, asked.radius).max()) < 1e-6


def test_without_a_weight_it_is_pgd_on_cross_entropy() -> None:
    """As a loop: a fifth of the steps at each step size, from the radius down by halves; the first wrong point of each image."""
    model, x = Curved().eval(), images(40)
    y, asked = labelled(model, x, 0), protocol()
    expected, broken = x.clone(), torch.zeros(40, dtype=torch.bool)
    for restart in range(2):
        at = random_point(x, EPS, "Linf", (0.0, 1.0), generator(x.device, "energy_ce", 3, restart))
        for step in range(21):
            at = at.detach().requires_grad_(True)
            loss = F.cross_entropy(model(at), y, reduction="sum")
            new = (model(at).argmax(1) != y) & ~broken
            expected[new], broken = at.detach()[new], broken | new
            size = EPS / 2 ** (step // 4)
            at = (x + (at + size * torch.autograd.grad(loss, at)[0].sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    assert torch.allclose(found(model, x, y, asked, weight=0.0), expected, atol=1e-6)
    assert 5 < int(broken.sum()) < 35
    other = found(model, x, y, asked, weight=1.0)
    assert not torch.allclose(other, expected, atol=1e-6)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    """It moves every energy, and no decision; the gradients are the same but for rounding, which their signs do not show here."""
    model, x = Curved().eval(), images(40)
    y, asked = labelled(model, x, 0), protocol()
    shifted = Of(model, lambda z: z + 8.0)
    assert torch.allclose(found(shifted, x, y, asked), found(model, x, y, asked), atol=1e-6)


def test_the_other_sign_does_not_saturate() -> None:
    """Where the softmax is 1 in fp32, cross-entropy has no gradient; CE + E = E(x, y) has, at the second start."""
    x = images(40)
    saturated = Of(Linear().eval(), lambda z: z * 1e4)
    y, asked = labelled(saturated, x, 0), protocol(eps=0.02)
    broken = {w: int((found(saturated, x, y, asked, weight=w) != x).flatten(1).any(1).sum()) for w in (0.0, 1.0)}
    starts = [random_point(x, asked.radius, "Linf", (0.0, 1.0), generator(x.device, "energy_ce", 3, k)) for k in (0, 1)]
    at_starts = int(torch.stack([saturated(start).argmax(1) != y for start in starts]).any(0).sum())
    assert broken[0.0] <= at_starts + 2  # it never leaves a start, but for images on a boundary
    assert broken[1.0] > at_starts + 8


def beside(model: nn.Module, x: Tensor, y: Tensor, state: Path | None = None, **values: float) -> dict[str, float]:
    """What is measured with an ensemble of one step, and the adaptive attack (none without values)."""
    weak: dict[str, dict[str, int] | None] = {**dict.fromkeys(("apgd_t", "fab_t", "square")), "apgd_ce": {"steps": 1}}
    own = {"like": "standard", "eps": EPS, "pgd": {"step_size": EPS / 4, "steps": 1}, "n": 30, "attacks": weak}
    own |= {"adaptive_attacks": {"energy_ce": values}} if values else {}
    asked = AttackSettings.model_validate({"protocols": {"standard": settings(EPS, 0).standard.model_dump(), "own": own}, "batch_size": 12})
    result = audit(model, x, y, asked, state=state, with_checks=False)
    frame = result.table.to_pandas().query("protocol == 'own'")
    stands = frame["clean"] & (frame["pgd1"] != False) & (frame["apgd_ce"] != False)  # noqa: E712 (None is not False)
    assert frame["worst"].tolist() == (stands & (frame["energy_ce"] != False) if values else stands).tolist()  # noqa: E712
    return result.metrics


def test_the_ensembles_figures_stay_what_they_are(tmp_path: Path) -> None:
    """The adaptive attack is a part of its own: what it broke, of how many, with interval, and the accuracy after both."""
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    without, with_it = beside(model, x, y), beside(model, x, y, tmp_path, steps=20)
    same = {name for name in without if "seconds" not in name}
    assert {name: with_it[name] for name in same} == {name: without[name] for name in same}
    added = {name.removeprefix("own_energy_ce_") for name in with_it.keys() - without.keys()}
    alone_names = {"alone", "alone_share", "alone_share_low", "alone_share_high"}
    assert added == {"correct", "acc", "low", "high", "found_l2", "found_ssim", "found_n"} | alone_names
    alone, n = with_it["own_energy_ce_alone"], 30
    assert 0 < alone == with_it["own_autoattack_correct"] - with_it["own_energy_ce_correct"]
    assert with_it["own_energy_ce_acc"] == with_it["own_energy_ce_correct"] / n
    assert (with_it["own_energy_ce_alone_share_low"], with_it["own_energy_ce_alone_share_high"]) == wilson(alone, n)
    again = beside(model, x, y, tmp_path, steps=20)  # finished batches are not attacked again
    assert again["own_attack_seconds"] == with_it["own_attack_seconds"]


def test_it_may_follow_the_standard_protocol_under_its_name() -> None:
    own = {"eps": EPS, "pgd": {"step_size": EPS / 4}, "n": 4, "adaptive_attacks": {"energy_ce": {"restarts": 3}}}
    asked = AttackSettings.model_validate({"protocols": {"standard": own}}).standard
    assert asked.adaptive_attacks["energy_ce"] == AdaptiveSettings(steps=100, restarts=3, weight=1.0)
    left_out = AttackSettings.model_validate({"protocols": {"standard": {**own, "adaptive_attacks": {"energy_ce": None}}}})
    assert left_out.standard.adaptive_attacks == {}


def test_a_start_ends_within_the_last_step_of_a_maximum_that_lies_inside_the_ball() -> None:
    """-5 - |x - c|^2 against 0: never broken, highest at c. The last fifth of the steps are a sixteenth of the radius."""
    x = images(6)
    c = x + 0.3 * EPS

    class Peak(nn.Module):
        def forward(self, at: Tensor) -> Tensor:
            peak = -5 - ((at - c) * 50).square().flatten(1).sum(1)
            return torch.stack([torch.zeros_like(peak), peak], 1)

    climb = adaptive._Climb(FastNetwork(Peak(), x), torch.zeros(6, dtype=torch.int64), 0.0)
    last = adaptive._climbed(climb, x, x, 50, protocol())
    assert float((last - c).abs().max()) <= EPS / 16 + 1e-6
    assert not climb.found.any()
