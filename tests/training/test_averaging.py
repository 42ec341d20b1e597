"""Averaged weights against the recursion by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import ParamsError, TrainingSettings, load
from ebjdat.training.averaging import averaged, decay
from tests.conftest import ROOT
from tests.training.conftest import changed, run, run_with_stops, same


def moved(network: WideResNet, step: int) -> None:
    """The weights and buffers of a training after a step, made up."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(step)))


def test_the_decay_is_0_in_the_warm_up_then_grows_to_its_bound(settings: TrainingSettings) -> None:
    """200 steps, a tenth of them for the warm-up: 20 copies, then (1 + d) / (10 + d) of d steps, at most 0.9."""
    warm = changed(settings, ema=0.9, ema_warmup=0.1)
    assert [decay(warm, step, 200) for step in (0, 19)] == [0, 0]
    assert [decay(warm, step, 200) for step in (20, 21, 29)] == pytest.approx([1 / 10, 2 / 11, 10 / 19])
    assert decay(warm, 20 + 79, 200) == pytest.approx(80 / 89)
    assert decay(warm, 20 + 81, 200) == decay(warm, 199, 200) == 0.9  # (1 + 80) / (10 + 80) is 0.9 itself
    assert [decay(changed(settings, ema=0.9), step, 200) for step in (0, 100)] == [0.9, 0.9]
    assert decay(changed(settings, ema=0.9, ema_warmup=0.0), 0, 200) == pytest.approx(0.1)


def test_weights_are_copied_in_the_warm_up_and_averaged_after_it(network: WideResNet, settings: TrainingSettings) -> None:
    """10 steps, 4 of them for the warm-up; against the recursion in double precision. Single precision has 1e-7 of values of about 3."""
    ema = averaged(network, changed(settings, ema=0.3, ema_warmup=0.4), 10)
    assert ema is not None
    by_hand = network.head.weight.detach().double()
    for step in range(10):
        moved(network, step)
        ema.update_parameters(network)
        current = network.head.weight.detach()
        kept = 0.0 if step < 4 else min(0.3, (1 + step - 4) / (10 + step - 4))
        by_hand = kept * by_hand + (1 - kept) * current.double()
        if step < 4:
            assert all(torch.equal(a, b) for a, b in zip(ema.module.state_dict().values(), network.state_dict().values(), strict=True))
        assert torch.allclose(ema.module.head.weight.double(), by_hand, atol=3e-6)
    assert not torch.allclose(ema.module.head.weight, network.head.weight, atol=1e-3)


def test_without_a_warm_up_it_is_torchs_moving_average(network: WideResNet, settings: TrainingSettings) -> None:
    """Bit for bit, also where the settings have none at all."""
    ours, torchs = (
        averaged(network, changed(settings, ema=0.9), 10),
        AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    assert ours is not None
    for step in range(5):
        moved(network, step)
        ours.update_parameters(network)
        torchs.update_parameters(network)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True))
    assert averaged(network, changed(settings, ema=None), 10) is None


@pytest.mark.slow
def test_a_killed_training_continues_its_average(settings: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    """Stopped at every step, in the warm-up (3 of 8 steps) and after it. The average ends where recursion says, which n_averaged is for."""
    warm = changed(settings, epochs=2, ema=0.99, ema_warmup=0.375, selection={"after": 0.9})
    whole = run(digits, warm, tmp_path / "whole", "pgd_at")
    cut, saves = run_with_stops(digits, warm, tmp_path / "cut", "pgd_at")
    assert saves > 8
    assert same(whole, cut)
    assert whole.selected.ema is not None
    assert cut.selected.ema is not None
    assert all(torch.equal(whole.selected.ema[name], cut.selected.ema[name]) for name in whole.selected.ema)
    cold = run(digits, changed(warm, ema_warmup=None), tmp_path / "cold", "pgd_at")
    assert same(whole, cold)  # averaging does not change what is averaged
    assert cold.selected.ema is not None
    assert not torch.equal(whole.selected.ema["head.weight"], cold.selected.ema["head.weight"])


def test_a_warm_up_of_nothing_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"ema_warmup 0\.1 is for averaged weights; set ema, their decay, too"):
        load(ROOT / "params/digits.yaml", ["experiments.pgd_at.training.ema_warmup=0.1"])
    warm = load(ROOT / "params/digits.yaml", ["experiments.pgd_at.training={ema: 0.9, ema_warmup: 0}"]).training_settings("pgd_at")
    assert (warm.ema, warm.ema_warmup) == (0.9, 0)
