"""Divergence: what counts as one, and that training comes back from it, the same way every time."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.data.prepared import Prepared
from ebjdat.params import HealingSettings, ParamsError, Rung, TrainingSettings, load
from ebjdat.training import healing, loop
from ebjdat.training.healing import Event, adjusted, symptoms, usable, vitals
from ebjdat.training.loop import TrainingError

from .conftest import ROOT
from .test_training import changed, run, same

RNG = torch.Generator().manual_seed(0)
IMAGES = torch.rand(64, 1, 8, 8, generator=RNG) * 1.8 - 0.9
BATCH = Batch(IMAGES, IMAGES, torch.arange(64) % 10)
HEALTHY = {"energy_clean": -5.0, "energy_generated": -4.0, "energy_adversarial": -3.0, "ce_clean": 0.5}
CHAINS = torch.rand(64, 1, 8, 8, generator=RNG) * 1.6 - 0.8
LOGITS = torch.zeros(64, 10)
nan, inf = math.nan, math.inf


def check(terms: dict[str, float] | None = None, chains: Tensor | None = CHAINS, after: Tensor = LOGITS, **sums: float) -> str:
    values = {name: torch.tensor(value) for name, value in {**HEALTHY, **(terms or {})}.items()}
    totals = {**values, **{name: torch.tensor(value) for name, value in sums.items()}}
    return "; ".join(symptoms(vitals(values, totals, BATCH, chains, after), HealingSettings(energy=100, gap=20)))


def test_a_healthy_step_has_no_symptoms() -> None:
    assert check() == ""
    assert check(chains=None) == ""
    assert check(chains=IMAGES.clamp(-0.5, 0.5)) == ""


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"terms": {"ce_clean": nan}}, "values that are not finite"),
        ({"loss": inf}, "values that are not finite"),  # of an earlier step: visible in the epoch's sums
        ({"after": torch.full((64, 10), nan)}, "values that are not finite"),  # the update broke the weights
        ({"terms": {"energy_clean": -101.0, "energy_generated": -100.0, "energy_adversarial": -100.0}}, "an energy of 101, beyond 100"),
        ({"after": torch.full((64, 10), 200.0)}, "an energy of 202.3, beyond 100"),
        ({"terms": {"energy_generated": -25.5}}, "an energy gap of 20.5, beyond 20"),
        ({"terms": {"energy_adversarial": 15.5}}, "an energy gap of 20.5, beyond 20"),
        ({"terms": {"ce_clean": 7.0}}, "a cross-entropy of 3.04 times that of a guess, beyond 3"),
        ({"after": 8 * F.one_hot((BATCH.y + 1) % 10, 10).float()}, "a cross-entropy of 3.48 times that of a guess"),
        ({"chains": torch.sign(CHAINS)}, "saturated chains (100%"),
        ({"chains": CHAINS * 50}, "saturated chains"),  # unclamped chains beyond the range
        ({"chains": CHAINS[:, :, :1, :1].expand(64, 1, 8, 8)}, "constant chains"),
        ({"chains": CHAINS[:1].expand(64, 1, 8, 8)}, "a collapsed buffer"),
        ({"chains": torch.full((64, 1, 8, 8), nan)}, "values that are not finite"),
    ],
)
def test_each_symptom_is_seen_and_named(step: dict[str, Any], expected: str) -> None:
    assert expected in check(**step)


def test_saturation_is_judged_against_the_images() -> None:
    """Digits are black at half of their pixels; chains that are so too are healthy."""
    half = IMAGES.clone()
    half[:, :, :, :4] = -1.0
    batch = Batch(half, half, BATCH.y)
    chains = CHAINS.clone()
    chains[:, :, :, :4] = -1.0
    values = {name: torch.tensor(value) for name, value in HEALTHY.items()}
    measured = vitals(values, values, batch, chains, LOGITS)
    assert measured["saturation"] == pytest.approx(0, abs=1e-6)
    chains[:, :, :4] = 1.0
    assert vitals(values, values, batch, chains, LOGITS)["saturation"] == pytest.approx((0.75 - 0.5) / 0.5)


def test_rungs_add_up(settings: TrainingSettings) -> None:
    rungs = [Rung(change="seed"), Rung(change="lr", by=0.1), Rung(change="lr", by=0.5), Rung(change="steps", by=2), Rung(change="seed")]
    after, seeds = adjusted(settings, [*rungs, Rung(change="energy_l2", by=0.01)])
    assert seeds == 2
    assert after.optimizer.lr == pytest.approx(settings.optimizer.lr * 0.05)
    assert after.chain.steps == 2 * settings.chain.steps
    assert after.weights.energy_l2 == 0.01
    assert adjusted(settings, []) == (settings, 0)
    assert [r.change for r in usable(rungs, ())] == ["lr", "lr"]
    assert [r.change for r in usable(rungs, ("adversarial",))] == ["seed", "lr", "lr", "seed"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.healing.every=101", "less than or equal to 100"),
        ("training.healing.ladder=[{change: lr}]", "'lr' needs `by`"),
        ("training.healing.ladder=[{change: lr, by: 2}]", "less than 1 is allowed"),
        ("training.healing.ladder=[{change: steps, by: 0.5}]", "more than 1 is allowed"),
        ("training.healing.ladder=[{change: seed, by: 2}]", "takes no `by`"),
        ("training.healing.ladder=[{change: restart}]", "found 'restart'"),
    ],
)
def test_ladders_that_cannot_work_are_refused(override: str, expected: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(expected)):
        load(ROOT / "params/digits.yaml", [override])


@pytest.fixture
def wild(settings: TrainingSettings) -> TrainingSettings:
    """The profile's EB-JDAT at 100 times its rate, for 8 epochs."""
    bounds = {"energy": 1000, "gap": 50}
    return changed(
        settings, epochs=8, optimizer={"lr": 100 * settings.optimizer.lr}, schedule={"name": "constant"}, ema=0.9, healing=bounds
    )


def test_a_hundred_times_the_rate_recovers_and_finishes_the_same_way_every_time(
    wild: TrainingSettings, digits: Prepared, tmp_path: Path
) -> None:
    events: list[Event] = []
    _, result = run(digits, wild, tmp_path / "a", events=events)
    assert len(result.rows) == 8
    assert events == result.events
    assert [e.change for e in events[:2]] == ["a new noise seed", "the rate x 0.1"]
    assert all(e.step <= 100 and e.symptoms for e in events)
    assert result.rows[-1]["lr"] == pytest.approx(wild.optimizer.lr * 0.1 ** sum("rate" in str(e.change) for e in events))
    assert result.rows[-1]["batch_acc_clean"] > 0.3  # a guess is 0.1
    assert all(torch.isfinite(v).all() for v in result.selected.weights.values())
    _, again = run(digits, wild, tmp_path / "b")
    assert same(result, again)
    assert again.events == result.events


def test_killed_at_every_save_it_recovers_to_the_same_weights(
    wild: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step, every end of an epoch and every recovery is saved and then interrupted."""
    _, whole = run(digits, wild, tmp_path / "whole")
    save = loop.Progress.save

    def save_and_stop(self: loop.Progress, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "save", save_and_stop)
    for _ in range(100):
        try:
            _, result = run(digits, wild, tmp_path / "cut", minutes=0.0)
            break
        except KeyboardInterrupt:
            continue
    assert result.events == whole.events
    assert same(whole, result)


def test_it_goes_back_to_the_last_healthy_epoch(settings: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    """The rate jumps a millionfold after epoch 2: epochs 1 and 2 are kept, epoch 3 is done again at the old rate."""
    jump = changed(
        settings,
        epochs=4,
        schedule={"name": "multistep", "milestones": [2], "factor": 1e6},
        healing={"energy": 1000, "gap": 50, "ladder": [{"change": "lr", "by": 1e-6}]},
    )
    calm = changed(settings, epochs=2, schedule={"name": "constant"}, selection={"after": 0.0})
    _, result = run(digits, jump, tmp_path / "a")
    _, first = run(digits, calm, tmp_path / "b")
    (event,) = result.events
    assert (event.epoch, event.back_to, event.change) == (3, 2, "the rate x 1e-06")
    assert [row["loss"] for row in result.rows[:2]] == [row["loss"] for row in first.rows]
    assert result.rows[2]["lr"] == pytest.approx(settings.optimizer.lr)
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]


def test_after_the_ladders_end_the_error_says_what_was_tried(wild: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    hopeless = changed(wild, optimizer={"lr": 1e20}, healing={"ladder": [{"change": "seed"}, {"change": "lr", "by": 0.5}]})
    with pytest.raises(TrainingError) as caught:
        run(digits, hopeless, tmp_path / "state")
    text = str(caught.value)
    assert re.search(r"diverged in epoch 1, step \d+: values that are not finite", text)
    assert "1. epoch 1" in text
    assert "a new noise seed" in text
    assert "2. epoch 1" in text
    assert "the rate x 0.5" in text
    assert str(tmp_path / "state") in text
    assert (tmp_path / "state/epoch.pt").exists()


def test_where_collapses_are_recorded_training_goes_on_as_if_nothing_had_been(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path
) -> None:
    """A bound that every step breaks: the first is noted, the weights are those of a training without checks."""
    record = changed(settings, epochs=2, healing={"mode": "record", "gap": 1e-9})
    _, result = run(digits, record, tmp_path / "a")
    _, plain = run(digits, changed(settings, epochs=2), tmp_path / "b")
    (event,) = result.events
    assert (event.epoch, event.step, event.change) == (1, 4, None)
    assert "energy gap" in event.symptoms[0]
    assert same(result, plain)


def test_a_recorded_training_that_breaks_ends_with_what_it_had(settings: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    schedule = {"name": "multistep", "milestones": [2], "factor": 1e30}
    record = changed(settings, epochs=4, schedule=schedule, selection={"after": 0.9}, healing={"mode": "record"})
    events: list[Event] = []
    _, result = run(digits, record, tmp_path / "a", events=events)
    assert events == result.events
    assert len(result.rows) == 2
    assert result.selected.epoch == 2
    assert result.events[0].epoch == 3
    assert all(torch.isfinite(v).all() for v in result.selected.weights.values())
    _, again = run(digits, record, tmp_path / "a")  # called again, it is already at its end
    assert same(result, again)


def test_every_bound_has_words() -> None:
    fields = set(HealingSettings.model_fields) - {"mode", "every", "ladder"}
    assert fields == set(healing.HIGHEST) | set(healing.LOWEST)
