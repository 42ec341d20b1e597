"""Catastrophic overfitting: it is seen where it happens, and looking for it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ebjdat.data.batches import DeviceData, generator
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import HealingSettings, ParamsError, TrainingSettings, load
from ebjdat.training.healing import symptoms
from ebjdat.training.state import TrainingState
from ebjdat.training.validation import WATCHED, watched_accuracy
from tests.conftest import ROOT
from tests.training.conftest import METHODS, changed, run, run_with_stops, same

FGSM = METHODS.training_settings("fgsm")


def test_a_fall_beyond_its_bound_is_a_symptom() -> None:
    measured = {"finite": 1.0, "robust_acc": 0.3, "overfitting": 0.25}
    (text,) = symptoms(measured, HealingSettings(overfitting=0.2))
    assert text == "catastrophic overfitting (PGD accuracy on training images is 25% of them below its best, beyond 20%)"
    assert symptoms(measured, HealingSettings(overfitting=0.25)) == ()
    state = TrainingState()
    falls = [state.follow(accuracy)["overfitting"] for accuracy in (0.25, 0.75, 0.5, 1.0, 0.25)]
    assert falls == [0, 0, 0.25, 0, 0.75]


def test_the_accuracy_is_that_under_pgd_of_the_first_training_images(
    network: WideResNet, train_data: DeviceData, settings: TrainingSettings
) -> None:
    """Against a loop written out, in eval mode and from the same starts; sliced so that a batch's memory suffices."""
    whole = changed(FGSM, batch_size=WATCHED, adversary={"eps": 0.02, "step_size": 0.005})
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = watched_accuracy(network, whole, train_data)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    x, y = train_data.unit(slice(0, WATCHED)), train_data.labels[:WATCHED]
    noise = torch.rand(x.shape, generator=generator(torch.device("cpu"), "watched", 0)) * 2 - 1
    moved = (x + 0.02 * noise).clamp(0, 1)
    for _ in range(10):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(2 * moved - 1), y), moved)
        moved = (moved.detach() + 0.005 * gradient.sign()).clamp(x - 0.02, x + 0.02).clamp(0, 1)
    assert found == pytest.approx(float((network(2 * moved - 1).argmax(1) == y).float().mean()), abs=1 / WATCHED)
    tiny = {"eps": 1e-7, "step_size": 1e-7}
    clean = float((network(2 * x - 1).argmax(1) == y).float().mean())
    for settings in (changed(whole, adversary=tiny), changed(whole, adversary=tiny, batch_size=48, compute={"accumulate": 2})):
        assert watched_accuracy(network, settings, train_data) == pytest.approx(clean, abs=1e-6)


@pytest.mark.slow
def test_looking_for_it_changes_nothing(digits: Prepared, tmp_path: Path) -> None:
    """The same weights, bit for bit; the curve has the two measurements."""
    blind, watching = (changed(FGSM, epochs=2, healing={"overfitting": bound, "every": 2}) for bound in (None, 0.99))
    without, followed = run(digits, blind, tmp_path / "a", "fgsm"), run(digits, watching, tmp_path / "b", "fgsm")
    assert same(without, followed)
    assert {*followed.rows[0]} - {*without.rows[0]} == {"health_robust_acc", "health_overfitting"}
    last = followed.rows[-1]
    assert last["health_robust_acc"] + last["health_overfitting"] == pytest.approx(followed.most_robust)
    assert followed.most_robust >= max(row["health_robust_acc"] for row in followed.rows)


@pytest.mark.slow
def test_a_killed_training_remembers_its_best_and_heals_the_same_way(digits: Prepared, tmp_path: Path) -> None:
    """A rate at which the accuracy falls now and then, and a bound that every such fall exceeds; stopped at every step."""
    rough = changed(
        METHODS.training_settings("pgd_at"),
        epochs=3,
        schedule={"name": "constant"},
        optimizer={"lr": 1.0},
        healing={"overfitting": 0.02, "every": 1, "ladder": [{"change": "lr", "by": 0.1}] * 8, "cross_entropy": 1e9},
    )
    whole = run(digits, rough, tmp_path / "whole", "pgd_at")
    cut, _ = run_with_stops(digits, rough, tmp_path / "cut", "pgd_at")
    assert whole.events
    assert all("catastrophic overfitting" in event.symptoms[0] for event in whole.events)
    assert cut.events == whole.events
    assert same(whole, cut)
    names = ("health_robust_acc", "health_overfitting")
    assert [[row[name] for name in names] for row in cut.rows] == [[row[name] for name in names] for row in whole.rows]


def test_it_is_refused_for_methods_without_adversarial_images() -> None:
    for name in ("classifier", "corners", "jempp"):
        with pytest.raises(ParamsError, match=f"{name}.training.healing.overfitting: is not read by method '{name}', which does not train"):
            load(ROOT / "params/digits-methods.yaml", [f"experiments.{name}.training.healing.overfitting=0.2"])
