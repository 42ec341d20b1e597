"""The training loop: sample, loss, update; check, heal; validate; keep what was selected. Knows methods only by their registry row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import DeviceData, Extra, epoch_batches, generator, steps_per_epoch
from ebjdat.errors import DataError
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.sampling import SamplingState, sampling_states
from ebjdat.progress import Bar, format_values
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import TrainingSettings
from ebjdat.training import healing
from ebjdat.training.healing import Diverged, Event
from ebjdat.training.interrupt import StopRequest
from ebjdat.training.state import END_OF_EPOCH, Job, Learner, TrainingError, TrainingState
from ebjdat.training.step import Step
from ebjdat.training.updates import When
from ebjdat.training.validation import validate, watched_accuracy

SHOWN = ("loss", "batch_clean_acc", "batch_robust_acc", "energy_clean", "energy_adversarial", "energy_generated")
SHOWN_CHAINS = 10  # epochs at which chains are shown


@dataclass(frozen=True)
class Hooks:
    """Called as training proceeds; a continued training calls `epoch` and `event` also for what happened before.

    epoch: with each finished epoch's row. event: with each divergence. chains: at about ten epochs, with the epoch and the replay
    buffer's first chains, 8 of each class, class by class, uint8 (N, C, H, W).
    """

    epoch: Callable[[dict[str, float]], None] = lambda row: None
    event: Callable[[Event], None] = lambda event: None
    chains: Callable[[int, Tensor], None] = lambda epoch, images: None


@dataclass(frozen=True)
class _Run:
    """What does not change while a training runs, or keeps its own state."""

    job: Job
    learner: Learner
    data: DeviceData
    extra: Extra | None
    pool: StartPool
    hooks: Hooks
    bar: Bar
    stop: StopRequest
    teacher: nn.Module | None


def train(
    model: WideResNet,
    job: Job,
    train_data: DeviceData,
    validation: DeviceData,
    class_mean: Tensor,
    hooks: Hooks | None = None,
    teacher: nn.Module | None = None,
    extra: DeviceData | None = None,
) -> TrainingState:
    """Train `model` in place; return its last state, with the checkpoint that validation selected.

    class_mean: (K, C, H, W) in [0, 1], for chain starts. teacher: the network that `training.teacher` names. extra: images that
    settings.extra has a share of. Continues from the job's state where there is one. Raises DataError when a batch does not fit the
    training split, TrainingError when training diverged and its ladder is exhausted.
    """
    epochs, hooks = job.settings.epochs, hooks or Hooks()
    per_epoch = _steps(job.settings, train_data)
    pool = StartPool.of(train_data, class_mean)
    learner = Learner.of(model, job, pool)
    more = Extra.of(extra, job.settings, job.seed) if extra is not None else None
    state = TrainingState.restore(job.state, learner)
    for row in state.rows:
        hooks.epoch(row)
    for event in state.events:
        hooks.event(event)
    model.train(job.settings.mode == "train")
    with Bar(job.title, epochs * per_epoch, state.epoch * per_epoch + state.step) as bar, StopRequest() as stop:
        run = _Run(job, learner, train_data, more, pool, hooks, bar, stop, teacher)
        if state.epoch or state.step:
            bar.line(f"continues at epoch {state.epoch + 1}, step {state.step}")
        if epochs and not (job.state / END_OF_EPOCH).exists():
            state.save(job.state, learner)  # the first state to go back to
        while state.epoch < epochs and not state.ended:
            try:
                row = run_epoch(run, state)
                score = _validated(run, state, validation, row)
            except Diverged as divergence:
                state = recover(job, learner, state, divergence)
                event = state.events[-1]
                hooks.event(event)
                bar.line(f"DIVERGED: {event}")
                bar.at(state.epoch * per_epoch)
                if not event.healed and not state.ended:
                    raise TrainingError(_exhausted(job, state)) from None
                continue
            _finish_epoch(run, state, row, score)
    if not state.selected.weights:  # no epochs, or ended before checkpoints compete
        state.select(0.0, state.epoch, learner)
    return state


def _validated(run: _Run, state: TrainingState, validation: DeviceData, row: dict[str, float]) -> float:
    """The score that selects; completes the row. Raises Diverged: broken running statistics show only in eval mode."""
    began = time.monotonic()
    score = validate(run.learner, run.job, validation, row)
    state.seconds += time.monotonic() - began
    if not math.isfinite(row["validation_energy"]):
        raise Diverged(state.step, ("validation energies that are not finite",))
    return score


def _finish_epoch(run: _Run, state: TrainingState, row: dict[str, float], score: float) -> None:
    job, learner, epochs = run.job, run.learner, run.job.settings.epochs
    row["seconds"] = state.seconds
    if state.epoch + 1 > job.settings.selection.after * epochs or state.epoch + 1 == epochs:
        state.select(score, state.epoch + 1, learner)
    state.finish_epoch(row)
    state.save(job.state, learner)
    run.hooks.epoch(row)
    if registry.METHODS[job.method].has_chains and (state.epoch % math.ceil(epochs / SHOWN_CHAINS) == 0 or state.epoch == epochs):
        run.hooks.chains(state.epoch, learner.first_chains(len(run.pool.mean)))
    shown = [n for n in (*SHOWN, "validation_clean_acc", "validation_robust_acc") if n in row]
    run.bar.line(f"epoch {state.epoch}/{epochs}  " + format_values({n: row[n] for n in shown}))


def _steps(settings: TrainingSettings, data: DeviceData) -> int:
    """Steps per epoch. Raises DataError when settings and data do not fit."""
    per_epoch = steps_per_epoch(len(data), settings.batch_size)
    if settings.epochs and not per_epoch:
        raise DataError(f"batch_size is {settings.batch_size}, but the training split has only {len(data)} images")
    if settings.epochs and settings.chains > len(data):
        raise DataError(f"density_batch_size is {settings.chains}, but the training split has only {len(data)} images")
    if settings.augment.pad >= data.images.shape[-1]:
        raise DataError(f"augment.pad is {settings.augment.pad}, images have {data.images.shape[-1]} pixels; reflection needs less")
    return per_epoch


def run_epoch(run: _Run, state: TrainingState) -> dict[str, float]:
    """The rest of the epoch in progress; returns its row. Raises Diverged when a check finds symptoms that must be healed."""
    job, learner, data = run.job, run.learner, run.data
    rungs = healing.usable(job.settings.healing.ladder, registry.METHODS[job.method])
    settings, reseeded = healing.adjusted(job.settings, rungs[: state.recoveries])
    salt = (reseeded,) if reseeded else ()
    train_step = Step(job.method, settings, learner.model, learner.optimizer, learner.own)
    schedule = registry.load(registry.SCHEDULES, settings.schedule.name)
    epoch, per_epoch = state.epoch, steps_per_epoch(len(data), settings.batch_size)

    batches = epoch_batches(data, settings.batch_size, settings.augment, job.seed, epoch, state.step, settings.own_density, run.extra)
    common = SamplingState.of_epoch(settings, learner.buffer, run.pool, epoch, run.teacher)
    sources = sampling_states(common, run.pool, ("chains", job.seed, epoch, *salt), state.step, per_epoch)
    began = time.monotonic()
    for step, (batch, source) in enumerate(zip(batches, sources, strict=True), state.step):
        factor = schedule(settings.schedule, epoch * per_epoch + step, per_epoch, settings.epochs)
        for group in learner.optimizer.param_groups:
            group["lr"] = settings.optimizer.lr * factor
        noise = generator(data.device, "step", job.seed, epoch, step, *salt)
        samples = train_step.sample(batch, source, noise)
        terms = train_step.update(batch, samples, When(epoch, noise))
        if learner.ema is not None:
            learner.ema.update_parameters(learner.model)
        terms = train_step.learn(batch, samples, terms, epoch * per_epoch + step, noise)
        state.add(terms)
        state.step = step + 1
        began, before = time.monotonic(), began
        state.seconds += began - before
        run.bar.advance()
        if run.bar.due():
            run.bar.show({name: value.item() for name, value in terms.scalars().items() if name in SHOWN})
        if (step + 1) % settings.healing.every == 0 or step + 1 == per_epoch:
            with frozen_parameters(learner.model, settings.mode), torch.no_grad():
                after = learner.model(batch.x)
            state.vitals = healing.vitals(terms, state.sums, batch, samples.get("negatives"), after)
            if settings.healing.overfitting is not None and "adversarial" in samples:
                state.vitals |= state.follow(watched_accuracy(learner.model, settings, data))
            _check(run, state)
        if run.stop.requested or state.unsaved_minutes() >= job.checkpoint_minutes:
            state.save(job.state, learner)
        if run.stop.requested:
            raise KeyboardInterrupt
    row = state.epoch_row(learner.optimizer)  # reads values, so the device is done
    state.seconds += time.monotonic() - began
    return row


def _check(run: _Run, state: TrainingState) -> None:
    """Raise Diverged for symptoms. Where they are only recorded, note the first and continue while values are finite."""
    symptoms = healing.symptoms(state.vitals, run.job.settings.healing)
    if not symptoms:
        return
    if run.job.settings.healing.mode == "heal" or not state.vitals["finite"]:
        raise Diverged(state.step, symptoms)
    if not state.events:
        state.events.append(Event(state.epoch + 1, state.step, symptoms, "recorded only", healed=False))
        run.hooks.event(state.events[-1])
        run.bar.line(f"COLLAPSED: {state.events[-1]}")


def recover(job: Job, learner: Learner, state: TrainingState, divergence: Diverged) -> TrainingState:
    """Load the last healthy state, the end of an epoch, into `learner`; the last event of the result says how to continue.

    It has climbed one rung of the ladder; or training ends there, where collapses are only recorded; or the ladder is exhausted.
    """
    settings = job.settings.healing
    rungs = healing.usable(settings.ladder, registry.METHODS[job.method])
    healthy = TrainingState.restore(job.state, learner, healthy=True)
    healthy.seconds = state.seconds
    healthy.ended = settings.mode == "record"
    healed = False
    if healthy.ended:
        action = f"ended with the state of epoch {healthy.epoch}"
    elif state.recoveries < len(rungs):
        healed, action = True, f"back to the end of epoch {healthy.epoch}, {healing.describe(rungs[state.recoveries])}"
    else:
        action = "nothing is left on the ladder"
    healthy.events = [*state.events, Event(state.epoch + 1, divergence.step, divergence.symptoms, action, healed)]
    if healed or healthy.ended:
        healthy.save(job.state, learner)
    return healthy


def _exhausted(job: Job, state: TrainingState) -> str:
    *tried, last = state.events
    lines = "".join(f"\n  {i}. {event}" for i, event in enumerate(tried, 1)) or "\n  nothing: healing.ladder is empty"
    chains = "add chain steps, " if registry.METHODS[job.method].has_chains else ""
    return (
        f"{job.title}: diverged in epoch {last.epoch}, step {last.step}: {'; '.join(last.symptoms)}. Already tried:{lines}\n"
        f"Lower optimizer.lr, {chains}or extend healing.ladder, and rerun: with changed settings this training starts anew. "
        f"Its healthy state of epoch {state.epoch} stays in {job.state}; results of other experiments are not touched."
    )
