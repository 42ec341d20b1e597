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

from ebjdat import registry
from ebjdat.data import batches
from ebjdat.data.batches import Batch
from ebjdat.data.prepared import Prepared
from ebjdat.objectives import recipes, sampling
from ebjdat.objectives.terms import Terms
from ebjdat.settings import HealingSettings, ParamsError, Rung, TrainingSettings, load
from ebjdat.training import healing, loop, schedules, state
from ebjdat.training.healing import Event, adjusted, symptoms, usable, vitals
from ebjdat.training.state import Learner, TrainingError
from tests.conftest import ROOT
from tests.training.conftest import changed, run, run_with_stops, same, spy

RNG = torch.Generator().manual_seed(0)


IMAGES = torch.rand(64, 1, 8, 8, generator=RNG) * 1.8 - 0.9


BATCH = Batch(IMAGES, IMAGES, torch.arange(64) % 10)


HEALTHY = {"clean": -5.0, "generated": -4.0, "adversarial": -3.0}


CHAINS = torch.rand(64, 1, 8, 8, generator=RNG) * 1.6 - 0.8


LOGITS = torch.zeros(64, 10)


nan, inf = math.nan, math.inf


def terms(ce: float = 0.5, **energies: float) -> Terms:
    values = {of: torch.tensor(value) for of, value in (HEALTHY | energies).items()}
    return Terms(torch.tensor(1.0), torch.tensor(ce), energies=values)


def check(of: Terms | None = None, chains: Tensor | None = CHAINS, after: Tensor = LOGITS, loss: float = 1.0) -> str:
    of = of or terms()
    sums = {**of.scalars(), "loss": torch.tensor(loss)}
    return "; ".join(symptoms(vitals(of, sums, BATCH, chains, after), HealingSettings(energy=100, gap=20)))


def test_a_healthy_step_has_no_symptoms() -> None:
    assert check() == ""
    assert check(chains=None) == ""
    assert check(chains=IMAGES.clamp(-0.5, 0.5)) == ""


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"of": terms(ce=nan)}, "values that are not finite"),
        ({"loss": inf}, "values that are not finite"),  # of an earlier step: visible in the epoch's sums
        ({"after": torch.full((64, 10), nan)}, "values that are not finite"),  # the update broke the weights
        ({"of": terms(clean=-101.0, generated=-100.0, adversarial=-100.0)}, "an energy of 101, beyond 100"),
        ({"after": torch.full((64, 10), 200.0)}, "an energy of 202.3, beyond 100"),
        ({"of": terms(generated=-25.5)}, "an energy gap of 20.5, beyond 20"),
        ({"of": terms(adversarial=15.5)}, "an energy gap of 20.5, beyond 20"),
        ({"of": terms(ce=7.0)}, "a cross-entropy of 3.04 times that of a guess, beyond 3"),
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
    of = terms()
    measured = vitals(of, of.scalars(), batch, chains, LOGITS)
    assert measured["saturation"] == pytest.approx(0, abs=1e-6)
    chains[:, :, :4] = 1.0
    assert vitals(of, of.scalars(), batch, chains, LOGITS)["saturation"] == pytest.approx((0.75 - 0.5) / 0.5)


def test_rungs_add_up(settings: TrainingSettings) -> None:
    rungs = [Rung(change="seed"), Rung(change="lr", by=0.1), Rung(change="lr", by=0.5), Rung(change="steps", by=2), Rung(change="seed")]
    after, seeds = adjusted(settings, [*rungs, Rung(change="energy_l2", by=0.01)])
    assert seeds == 2
    assert after.optimizer.lr == pytest.approx(settings.optimizer.lr * 0.05)
    assert after.chain.steps == 2 * settings.chain.steps
    assert after.weights.energy_l2 == 0.01
    strict = changed(settings, weights={"energy_l2": 0.5}, chain={"steps": 3})
    assert adjusted(strict, [Rung(change="energy_l2", by=0.01)])[0].weights.energy_l2 == 0.5  # never lowered
    assert adjusted(strict, [Rung(change="steps", by=1.1)])[0].chain.steps == 4  # never for nothing
    assert usable([Rung(change="energy_l2", by=0.01), Rung(change="steps", by=2)], registry.METHODS["pgd_at"]) == ()
    assert adjusted(settings, []) == (settings, 0)
    assert [r.change for r in usable(rungs, registry.METHODS["classifier"])] == ["lr", "lr"]
    assert [r.change for r in usable(rungs, registry.METHODS["pgd_at"])] == ["seed", "lr", "lr", "seed"]


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


@pytest.mark.slow
def test_a_hundred_times_the_rate_recovers_and_finishes_the_same_way_every_time(
    wild: TrainingSettings, digits: Prepared, tmp_path: Path
) -> None:
    events: list[Event] = []
    result = run(digits, wild, tmp_path / "a", events=events)
    assert len(result.rows) == 8
    assert events == result.events
    assert [e.action for e in events[:2]] == [f"back to the end of epoch 0, {change}" for change in ("a new noise seed", "the rate x 0.1")]
    assert all(e.step <= 100 and e.symptoms for e in events)
    assert result.rows[-1]["lr"] == pytest.approx(wild.optimizer.lr * 0.1 ** sum("rate" in e.action for e in events))
    assert result.rows[-1]["batch_clean_acc"] > 0.3  # a guess is 0.1
    assert all(torch.isfinite(v).all() for v in result.selected.weights.values())
    again = run(digits, wild, tmp_path / "b")
    assert same(result, again)
    assert again.events == result.events


@pytest.mark.slow
def test_killed_at_every_save_it_recovers_to_the_same_weights(wild: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    """Every step, every end of an epoch and every recovery is saved and then interrupted."""
    whole = run(digits, wild, tmp_path / "whole")
    result, _ = run_with_stops(digits, wild, tmp_path / "cut")
    assert result.events == whole.events
    assert same(whole, result)


@pytest.mark.slow
def test_it_goes_back_to_the_last_healthy_epoch(settings: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    """The rate jumps a millionfold after epoch 2: epochs 1 and 2 are kept, epoch 3 is done again at the old rate."""
    jump = changed(
        settings,
        epochs=4,
        schedule={"name": "multistep", "milestones": [2], "factor": 1e6},
        healing={"energy": 1000, "gap": 50, "ladder": [{"change": "lr", "by": 1e-6}]},
    )
    calm = changed(settings, epochs=2, schedule={"name": "constant"}, selection={"after": 0.0})
    result = run(digits, jump, tmp_path / "a")
    first = run(digits, calm, tmp_path / "b")
    (event,) = result.events
    assert (event.epoch, event.action, event.healed) == (3, "back to the end of epoch 2, the rate x 1e-06", True)
    assert [row["loss"] for row in result.rows[:2]] == [row["loss"] for row in first.rows]
    assert result.rows[2]["lr"] == pytest.approx(settings.optimizer.lr)
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]


def test_after_the_ladders_end_the_error_says_what_was_tried(wild: TrainingSettings, digits: Prepared, tmp_path: Path) -> None:
    hopeless = changed(wild, optimizer={"lr": 1e20}, healing={"ladder": [{"change": "seed"}, {"change": "lr", "by": 0.5}]})
    events: list[Event] = []
    with pytest.raises(TrainingError) as caught:
        run(digits, hopeless, tmp_path / "state", events=events)
    text = str(caught.value)
    assert [e.healed for e in events] == [True, True, False]
    assert events[-1].action == "nothing is left on the ladder"
    assert re.search(r"diverged in epoch 1, step \d+: values that are not finite", text)
    assert "1. epoch 1" in text
    assert "a new noise seed" in text
    assert "2. epoch 1" in text
    assert "the rate x 0.5" in text
    assert str(tmp_path / "state") in text
    assert (tmp_path / "state/epoch.pt").exists()


@pytest.mark.slow
def test_where_collapses_are_recorded_training_goes_on_as_if_nothing_had_been(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path
) -> None:
    """A bound that every step breaks: the first is noted, the weights are those of a training without checks."""
    record = changed(settings, epochs=2, healing={"mode": "record", "gap": 1e-9})
    result = run(digits, record, tmp_path / "a")
    plain = run(digits, changed(settings, epochs=2), tmp_path / "b")
    (event,) = result.events
    assert (event.epoch, event.step, event.action, event.healed) == (1, 4, "recorded only", False)
    assert "energy gap" in event.symptoms[0]
    assert same(result, plain)


@pytest.mark.slow
def test_a_recorded_training_that_breaks_ends_with_what_it_had(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"name": "multistep", "milestones": [2], "factor": 1e30}
    record = changed(settings, epochs=4, schedule=schedule, selection={"after": 0.9}, healing={"mode": "record"})
    events: list[Event] = []
    result = run(digits, record, tmp_path / "a", events=events)
    assert events == result.events
    assert [(e.epoch, e.action, e.healed) for e in events] == [(3, "ended with the state of epoch 2", False)]
    assert len(result.rows) == 2
    assert result.selected.epoch == 2
    assert result.events[0].epoch == 3
    assert all(torch.isfinite(v).all() for v in result.selected.weights.values())
    monkeypatch.setattr(loop, "run_epoch", lambda *_: pytest.fail("it is already at its end"))
    again = run(digits, record, tmp_path / "a")
    assert same(result, again)


def sick_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next check finds a symptom, later ones none: exactly one rung is climbed."""
    verdicts = iter([("sick",)])
    monkeypatch.setattr(healing, "symptoms", lambda *_: next(verdicts, ()))


@pytest.mark.slow
def test_each_rung_reaches_what_it_is_to_change(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try's noise, chain steps, penalty and rate, as the sampler, the loss and the optimiser see them."""
    purposes = spy(monkeypatch, loop, "generator", lambda device, *purpose: purpose)
    sampled = spy(monkeypatch, batches, "generator", lambda device, *purpose: purpose)
    steps = spy(monkeypatch, sampling, "run_chain", lambda model, x, y, spec, noise: spec.steps)
    penalties = spy(monkeypatch, recipes, "_generation", lambda *arguments: arguments[-1].energy_l2)
    ladders = {"seed": {}, "steps": {"by": 2}, "energy_l2": {"by": 0.125}, "lr": {"by": 0.5}}
    for change, by in ladders.items():
        sick_once(monkeypatch)
        for seen in (purposes, sampled, steps, penalties):
            seen.clear()
        result = run(digits, changed(settings, epochs=1, healing={"ladder": [{"change": change, **by}]}), tmp_path / change)
        noise = [purpose for purpose in purposes if purpose[0] == "step"]
        plans = [purpose for purpose in sampled if purpose[0] == "chains"]
        assert len(plans) == 2
        assert (plans[0] == plans[1]) == (change != "seed")
        assert len(noise) == len(steps) == len(penalties) == 8
        assert (noise[:4] == noise[4:]) == (change != "seed")
        assert steps == [2] * 4 + [4 if change == "steps" else 2] * 4
        assert penalties == [0] * 4 + [0.125 if change == "energy_l2" else 0] * 4
        assert result.rows[0]["lr"] == pytest.approx(schedule_end(settings) * (0.5 if change == "lr" else 1))


def schedule_end(settings: TrainingSettings) -> float:
    """The rate at the last of 4 steps."""
    return settings.optimizer.lr * schedules.onecycle(settings.schedule, 3, 4, 1)


@pytest.mark.slow
def test_noise_differs_from_step_to_step_epoch_to_epoch_and_seed_to_seed(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purposes = spy(monkeypatch, loop, "generator", lambda device, *purpose: purpose)
    buffers = spy(monkeypatch, state, "generator", lambda device, *purpose: purpose)
    others = spy(monkeypatch, batches, "generator", lambda device, *purpose: purpose)
    run(digits, changed(settings, epochs=2), tmp_path / "a")
    monkeypatch.setattr(sampling, "PLANNED_STEPS", 1)
    run(digits, changed(settings, epochs=2), tmp_path / "b", seed=1)
    for seen, kind, n in ((purposes, "step", 16), (others, "augment", 16), (others, "chains", 2 + 8)):
        of_kind = [purpose for purpose in seen if purpose[0] == kind]
        assert len(of_kind) == len(set(of_kind)) == n
    assert buffers == [("buffer", 0), ("buffer", 1)]


def test_checks_come_when_they_are_asked_for_and_change_nothing(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step or once per epoch: the same weights; in between a broken step is seen at once."""
    checks = spy(monkeypatch, healing, "vitals", lambda *_: 1)
    often, seldom = (run(digits, changed(settings, epochs=1, healing={"every": n}), tmp_path / str(n)) for n in (1, 100))
    assert len(checks) == 4 + 1
    assert same(often, seldom)
    broken = changed(settings, optimizer={"lr": 1e20}, schedule={"name": "constant"}, healing={"every": 1, "ladder": []})
    events: list[Event] = []
    with pytest.raises(TrainingError, match=r"healing\.ladder is empty"):
        run(digits, broken, tmp_path / "broken", events=events)
    assert events[0].step == 1


def test_weights_that_break_in_eval_mode_alone_are_not_kept(
    settings: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics are broken after the first epoch's last check: validation sees it, and the epoch is done again."""
    real, calls = loop.validate, []

    def validate(learner: Learner, *rest: Any) -> float:
        calls.append(1)
        if len(calls) == 1:
            learner.model.norm.running_var.fill_(inf)
            learner.model.norm.running_mean.fill_(nan)
        return real(learner, *rest)

    monkeypatch.setattr(loop, "validate", validate)
    result = run(digits, changed(settings, epochs=1), tmp_path / "a")
    (event,) = result.events
    assert event.symptoms == ("validation energies that are not finite",)
    assert len(result.rows) == 1
    assert all(torch.isfinite(v).all() for v in result.selected.weights.values())


def test_a_state_to_go_back_to_that_is_gone_is_an_error(
    wild: TrainingSettings, digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = healing.symptoms

    def symptoms(*arguments: Any) -> tuple[str, ...]:
        (tmp_path / "state/epoch.pt").unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(healing, "symptoms", symptoms)
    with pytest.raises(TrainingError, match="the healthy state is missing"):
        run(digits, wild, tmp_path / "state")


def test_vitals_are_relative_to_the_right_images_and_the_number_of_classes() -> None:
    """Saturation against the images themselves, spreads against the noisy ones, cross-entropy against log K."""
    noisy = Batch(IMAGES, IMAGES * 2, BATCH.y % 4)
    of = terms()
    found = vitals(of, of.scalars(), noisy, CHAINS, torch.zeros(64, 4))
    assert found["cross_entropy"] == pytest.approx(1)  # a guess
    assert found["diversity"] == pytest.approx(float(CHAINS.std(0).mean() / (2 * IMAGES).std(0).mean()), rel=1e-5)
    black = Batch(-torch.ones_like(IMAGES), IMAGES, BATCH.y % 4)
    assert vitals(of, of.scalars(), black, torch.sign(CHAINS), torch.zeros(64, 4))["saturation"] == 0


def test_every_bound_has_words() -> None:
    fields = set(HealingSettings.model_fields) - {"mode", "every", "ladder"}
    assert fields == set(healing.HIGHEST) | set(healing.LOWEST)
