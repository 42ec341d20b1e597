"""The loop: the same seed, resumption bit for bit, selection by validation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ebjdat.data.batches import Batch, DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.metrics import describe
from ebjdat.models.wrn import build
from ebjdat.objectives import sampling
from ebjdat.settings import ModelSettings, TrainingSettings
from ebjdat.training import loop
from ebjdat.training.state import Job, Learner
from tests.training.conftest import FULL, METHODS, changed, run, run_with_stops, same


def test_the_last_epoch_always_competes(digits: Prepared, settings: TrainingSettings, tmp_path: Path) -> None:
    result = run(digits, changed(settings, epochs=2, selection={"after": 1.0}), tmp_path / "state")
    assert result.selected.epoch == 2
    assert result.selected.score == (result.rows[-1]["validation_clean_acc"] + result.rows[-1]["validation_robust_acc"]) / 2 > 0


EACH = {  # an experiment of each method, base and form, and of each way to take a step
    (e.method, e.base, e.form, e.training.mode, e.training.update.name): name
    for profile in (METHODS, FULL)
    for name, e in reversed(profile.experiments.items())
    if e.method != "trades" or e.training.update.name == "plain"
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EACH.values())
def test_every_method_trains_repeats_itself_and_logs_what_it_has(experiment: str, digits: Prepared, tmp_path: Path) -> None:
    """One short epoch, twice: the same seed gives the same weights."""
    profile = FULL if experiment in FULL.experiments else METHODS
    method = profile.experiments[experiment].method
    settings = changed(profile.training_settings(experiment), epochs=1, chain={"steps": 2, "buffer": 128}, adversary={"steps": 1})
    before = build(ModelSettings(depth=10, width=1), 1, 10, 0).state_dict()
    result, again = (run(digits, settings, tmp_path / name, method) for name in "ab")
    assert same(result, again)
    assert not torch.equal(before["stem.weight"], result.selected.weights["stem.weight"])
    logged = set(result.rows[0])
    assert {describe(name).stage for name in logged} <= {"curve", "energy"}
    assert {"loss", "lr", "epoch", "seconds", "validation_clean_acc", "health_energy", "health_cross_entropy"} <= logged
    assert ("validation_robust_acc" in logged) == (method not in ("classifier", "jem", "jempp", "sadajem"))
    chains = method in ("jem", "jempp", "sadajem", "eb_jdat", "jeat_style", "jeat_noise")
    assert ("energy_generated" in logged) == ("health_diversity" in logged) == (result.selected.buffer is not None) == chains
    assert (result.selected.ema is not None) == (settings.ema is not None) == ("ema_validation_clean_acc" in logged)


@pytest.mark.slow
def test_an_interrupted_epoch_continues_bit_for_bit(
    digits: Prepared, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every single step in turn; also the rows' running means and the buffer are restored, and chains planned.

    With images of the p(x) term of their own, whose passes do not end with the epochs, and a budget that depends on the epoch.
    """
    monkeypatch.setattr(sampling, "PLANNED_STEPS", 3)
    settings = changed(settings, epochs=2, ema=0.9, density_batch="own", density_batch_size=40, augment={"labelled_noise": 0.03})
    settings = changed(settings, adversary={"budget": {"name": "robust_lt"}})
    sizes, batches = set(), loop.epoch_batches

    def noted(*arguments: Any, **named: Any) -> Iterator[Batch]:
        for batch in batches(*arguments, **named):
            sizes.add((len(batch.x), len(batch.x_density)))
            yield batch

    monkeypatch.setattr(loop, "epoch_batches", noted)
    whole = run(digits, settings, tmp_path / "whole")
    result, saves = run_with_stops(digits, settings, tmp_path / "cut")
    assert saves == 1 + 2 * (4 + 1)  # at the start, after each of 4 steps, and at the end of the epoch
    assert same(whole, result)
    assert all(torch.equal(whole.selected.ema[k], result.selected.ema[k]) for k in whole.selected.ema)  # type: ignore[index, union-attr]
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(whole.rows) == strip(result.rows)
    assert sizes == {(settings.batch_size, 40)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "shows", "changes"),
    [
        ("dat", "contrast_steps", {"contrast": {"every": 3, "most": 3, "threshold": 0.5, "ood": "noise"}, "adversary": {"steps": 1}}),
        ("las_at", "policy_reward", {"policy": {"every": 3, "lr": 1.0}, "compute": {"accumulate": 2}}),
    ],
)
def test_a_methods_own_state_continues_bit_for_bit(
    method: str, shows: str, changes: dict[str, Any], digits: Prepared, tmp_path: Path
) -> None:
    """DAT's number of steps and running area, LAS-AT's policy: stopped after every step, so between two of their changes, too.

    Batch norm stays frozen, where it is to.
    """
    settings = changed(METHODS.training_settings(method), epochs=2, **changes)
    whole = run(digits, settings, tmp_path / "whole", method)
    result, saves = run_with_stops(digits, settings, tmp_path / "cut", method)
    assert saves == 1 + 2 * (4 + 1)
    assert same(whole, result)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(whole.rows) == strip(result.rows)
    assert whole.rows[-1][shows] > 0
    weights = whole.selected.weights
    kept = all((value == ("var" in name)).all() for name, value in weights.items() if "running" in name)
    assert kept == (settings.mode == "eval") == (method == "dat")
    assert not torch.equal(weights["norm.weight"], torch.ones_like(weights["norm.weight"]))


def test_the_budget_of_an_epoch_is_the_epochs(digits: Prepared, tmp_path: Path) -> None:
    """Of TRADES, whose divergence is 0 where neighbours do not move: in the first epoch, and then no longer."""
    settings = changed(METHODS.training_settings("trades"), epochs=2, adversary={"budget": {"name": "robust_lt"}})
    first, second = run(digits, settings, tmp_path / "state", "trades").rows
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # float32
    assert first["energy_clean"] == pytest.approx(first["energy_adversarial"], abs=1e-6)
    assert second["kl"] > 1e-4


def test_selection_uses_validation_and_a_later_epoch_wins_ties(
    digits: Prepared, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.5, 0.7, 0.7, 0.6])
    weights = []

    def validate(learner: Learner, job: Job, data: DeviceData, row: dict[str, float]) -> float:
        row["validation_energy"] = -1.0
        weights.append(learner.model.state_dict()["head.bias"].clone())
        return next(scores)

    monkeypatch.setattr(loop, "validate", validate)
    result = run(digits, changed(settings, epochs=5, selection={"after": 0.2}), tmp_path / "state")
    assert result.selected.epoch == 4  # the first epoch lies before `after`; 3 and 4 tie
    assert torch.equal(result.selected.weights["head.bias"], weights[3])
