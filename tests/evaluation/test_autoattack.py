"""The attacks against pyautoattack's own, and what makes them cost less."""

from __future__ import annotations

import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

from ebjdat.evaluation import autoattack, robust
from ebjdat.settings import EnsembleSettings

from ..conftest import Linear
from ..networks import Curved, N, Of, images, labelled, settings


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


@pytest.mark.slow
def test_bf16_search_leaves_verdicts_to_fp32() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    fp32 = robust.evaluate(model, x, y, "quick", settings(0.012, 40))
    bf16 = robust.evaluate(model, x, y, "quick", settings(0.012, 40, search="bf16"))
    names = ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert (bf16.robust_under(names) != fp32.robust_under(names)).sum() <= 1  # of 40: another search, the same judge
    with_all = bf16.robust_under(names)
    assert with_all[~fp32.robust_under(names)].sum() <= 1


@pytest.mark.slow
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


def test_attacks_leave_torchs_generator_as_it_was(linear: Linear) -> None:
    x = images(8)
    before = torch.get_rng_state()
    robust.evaluate(linear, x, labelled(linear, x, 0), "quick", settings(0.02, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_autoattacks_own_word_on_square_is_heard() -> None:
    assert autoattack.square_flag({"clean": 0.9, "apgd_ce": 0.8, "square": 0.8}) == []
    (told,) = autoattack.square_flag({"clean": 0.9, "apgd_ce": 0.8, "square": 0.7})
    assert "Square Attack has decreased the robust accuracy of 10.00%" in told
    model, x = Of(Curved().eval(), lambda z: (z * 2).round() / 2), images()
    verdicts = robust.evaluate(model, x, labelled(model, x), "quick", settings(0.05))
    assert any("Square Attack has decreased" in text for text in verdicts.flags)
    assert any("zero gradient" in text for text in verdicts.flags)


def test_a_targeted_attack_aims_at_all_other_classes_at_most() -> None:
    assert [autoattack.aimed_at(EnsembleSettings(targets=9), classes) for classes in (4, 10, 100)] == [3, 9, 9]
