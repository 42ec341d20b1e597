"""Label smoothing against its definition: which losses read it, and what it makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat import registry
from ebjdat.data.batches import Batch
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.parts import cross_entropies, smoothed, smoothed_mean
from ebjdat.objectives.terms import Terms
from ebjdat.settings import ParamsError, WeightSettings, load
from tests.conftest import ROOT

RNG = torch.Generator().manual_seed(0)
LOGITS, Y = torch.randn(6, 5, generator=RNG), torch.tensor([0, 1, 2, 3, 4, 0])
MADE = ("negatives", "adversarial", "uniform", "corner", "nuisance", "nuisance_isotropic", "nuisance_complement", "nuisance_shuffled")
IMAGES = {name: torch.rand(8, 1, 8, 8, generator=RNG) * 2 - 1 for name in ("x", *MADE)}
BATCH = Batch(IMAGES["x"], IMAGES["x"], torch.arange(8))
# what the losses on labels see: the images of each cross-entropy
LABELLED = {"classifier": ("x",), "pgd_at": ("adversarial",), "trades": ("x",), "weat_adv": ("adversarial",), "der": ("adversarial",)}
LABELLED |= {"gradalign": ("adversarial",), "corners": ("corner",), "jem": ("x",), "eb_jdat": ("x", "adversarial")}
TESTED = {name: row for name, row in registry.METHODS.items() if set(row.samples) <= set(IMAGES)}


def by_definition(logits: Tensor, y: Tensor, s: float) -> Tensor:
    logs = logits.log_softmax(1)
    return (1 - s) * -logs[range(len(y)), y] + s * (-logs).mean(1)


def terms_of(network: WideResNet, method: str, **weights: object) -> Terms:
    terms: Terms = registry.load(registry.METHODS, method)(network, BATCH, IMAGES, WeightSettings.model_validate(weights))
    return terms


@pytest.mark.parametrize("s", [0.0, 0.1, 0.7])
def test_smoothed_cross_entropies_are_those_of_the_definition(s: float) -> None:
    """To rounding; the other convention, s / (K - 1) for each other class, is ours at s K / (K - 1); without it, torch's bit for bit."""
    weights = WeightSettings(smoothing=s)
    ours = smoothed(LOGITS, Y, weights)
    assert torch.allclose(ours, by_definition(LOGITS, Y, s), atol=1e-6)
    assert float(smoothed_mean(LOGITS, Y, weights)) == pytest.approx(float(ours.mean()), abs=1e-6)
    targets = torch.full((6, 5), s / 4).scatter(1, Y[:, None], 1 - s)
    others = -(targets * LOGITS.log_softmax(1)).sum(1)
    if s * 5 / 4 < 1:
        assert torch.allclose(smoothed(LOGITS, Y, WeightSettings(smoothing=s * 5 / 4)), others, atol=1e-6)
    if not s:
        assert torch.equal(ours, cross_entropies(LOGITS, Y))
        assert torch.equal(smoothed_mean(LOGITS, Y, weights), F.cross_entropy(LOGITS, Y))


@pytest.mark.parametrize("method", LABELLED)
def test_losses_change_by_what_smoothing_changes_their_cross_entropies(network: WideResNet, method: str) -> None:
    """Nothing else does: what is logged as a cross-entropy has plain labels. Losses are about 10; single precision has 1e-6."""
    plain, smooth = (terms_of(network, method, smoothing=s) for s in (0.0, 0.3))
    expected = 0.0
    with torch.no_grad():
        for name in LABELLED[method]:
            logits = network(IMAGES[name])
            expected += float((by_definition(logits, BATCH.y, 0.3) - by_definition(logits, BATCH.y, 0.0)).mean())
    assert float((smooth.loss - plain.loss).detach()) == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3
    rest = {name: value for name, value in plain.scalars().items() if name != "loss"}
    assert all(torch.equal(value, smooth.scalars()[name]) for name, value in rest.items())


def test_methods_state_whether_they_read_it(network: WideResNet) -> None:
    """Each row's `reads`, against its loss."""
    reading = [name for name in TESTED if terms_of(network, name, smoothing=0.3).loss != terms_of(network, name).loss]
    assert reading == [name for name, row in TESTED.items() if "smoothing" in row.reads]


def test_it_is_refused_where_no_loss_reads_it() -> None:
    smooth = {name: f"experiments.{name}.training.weights.smoothing=0.1" for name in ("trades", "mart", "s2o")}
    assert load(ROOT / "params/digits-methods.yaml", [smooth["trades"]]).training_settings("trades").weights.smoothing == 0.1
    for name in ("mart", "s2o"):
        with pytest.raises(ParamsError, match=f"{name}.training.weights.smoothing: is not read by method '{name}'"):
            load(ROOT / "params/digits-methods.yaml", [smooth[name]])
