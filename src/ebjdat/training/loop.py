"""The training loop: draw, loss, update; check, heal; validate; keep what was selected. Knows methods only by their registry entry."""

from __future__ import annotations

import math
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebjdat import registry
from ebjdat.data.batches import DeviceData, epoch_batches, generator, steps_per_epoch
from ebjdat.errors import DataError, UserError, brief
from ebjdat.files import write_atomic
from ebjdat.models.energy import marginal_energy
from ebjdat.models.logits import predicted
from ebjdat.models.modes import evaluating, frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.sampling import SamplingState, neighbours
from ebjdat.pixels import uint8_from_unit, unit_from_internal
from ebjdat.progress import Bar, format_values
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.chains import starter
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import TrainingSettings
from ebjdat.training import healing
from ebjdat.training.healing import Event
from ebjdat.training.step import Step

SHOWN = ("loss", "batch_clean_acc", "batch_robust_acc", "energy_clean", "energy_adversarial", "energy_generated")
VALIDATION_BATCH = 250
SHOWN_CHAINS = 10  # epochs at which chains are shown
PLANNED_STEPS = 100  # steps whose chains are samples from the buffer at once


class TrainingError(UserError):
    """Training cannot go on; says why and what to change."""


class Diverged(Exception):  # noqa: N818 (not an error: the loop heals it)
    """A check found symptoms that training must not go on with."""

    def __init__(self, step: int, symptoms: tuple[str, ...]) -> None:
        super().__init__("; ".join(symptoms))
        self.step = step
        self.symptoms = symptoms


@dataclass
class Selected:
    """The best checkpoint so far by the validation score; a later one wins a tie."""

    score: float = -1.0
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] | None = None  # averaged weights of the same epoch
    buffer: Tensor | None = None  # uint8 (N, C, H, W)
    buffer_labels: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    selected: Selected
    rows: list[dict[str, float]]  # one per epoch: means over its steps, validation scores, learning rate, seconds
    events: list[Event]
    seconds: float


@dataclass(frozen=True)
class Job:
    """One training: what to minimise, with which settings, on which data; `seed` determines the rest."""

    title: str
    method: str
    settings: TrainingSettings
    seed: int
    state: Path  # folder of the resumable state; deleting it starts again
    checkpoint_minutes: float = 5.0


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets `asked`, so that the state can be saved between two steps.

    A second one stops at once. Outside the main thread nothing is changed, since Python allows handlers only there.
    """

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()


@dataclass(frozen=True)
class Learner:
    """Everything that a training step changes. buffer: for methods with chains; ema: where the settings ask for it."""

    model: WideResNet
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer | None
    ema: AveragedModel | None

    @classmethod
    def of(cls, model: WideResNet, job: Job, pool: StartPool) -> Learner:
        settings, device = job.settings, pool.data.device
        optimizer = registry.load(registry.OPTIMIZERS, settings.optimizer.name)(model.parameters(), settings.optimizer)
        buffer = None
        if "negatives" in registry.METHODS[job.method].samples:
            noise, start = generator(device, "buffer", job.seed), starter(settings.chain, pool)
            buffer = ReplayBuffer.fresh(settings.chain.buffer, len(pool.mean), start, device, noise)
        average = get_ema_multi_avg_fn(settings.ema) if settings.ema else None
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if average else None
        return cls(model, optimizer, buffer, ema)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.images,
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.buffer is not None:
            self.buffer.images.copy_(state["buffer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def train(
    model: WideResNet,
    job: Job,
    train_data: DeviceData,
    validation: DeviceData,
    class_mean: Tensor,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_chains: Callable[[int, Tensor], None] = lambda epoch, images: None,
) -> Trained:
    """Train `model` in place; return the checkpoint that validation selected.

    class_mean: (K, C, H, W) in [0, 1], for chain starts. on_epoch and on_event: called with each finished epoch's row and
    each divergence, and, when a stopped training is continued, with those from before. on_chains: called at about ten
    epochs with the replay buffer's first chains, 8 of each class, class by class, uint8 (N, C, H, W). Raises DataError when a
    batch does not fit the training split, TrainingError when training diverged and its ladder is at its end.
    """
    epochs = job.settings.epochs
    per_epoch = _steps(job.settings, train_data)
    pool = StartPool.of(train_data, class_mean)
    learner = Learner.of(model, job, pool)
    progress = Progress.restore(job.state, learner)
    for row in progress.rows:
        on_epoch(row)
    for event in progress.events:
        on_event(event)
    model.train()
    with Bar(job.title, epochs * per_epoch, progress.epoch * per_epoch + progress.step) as bar, StopRequest() as stop:
        if progress.epoch or progress.step:
            bar.line(f"continues at epoch {progress.epoch + 1}, step {progress.step}")
        if epochs and not (job.state / END_OF_EPOCH).exists():
            progress.save(job.state, learner)  # the first state to go back to
        while progress.epoch < epochs and not progress.ended:
            try:
                row = run_epoch(job, learner, progress, train_data, pool, bar, stop, on_event)
                began = time.monotonic()
                score = validate(learner, job, validation, row)
                progress.seconds += time.monotonic() - began
                if not math.isfinite(row["validation_energy"]):  # in eval mode: broken running statistics show only here
                    raise Diverged(progress.step, ("validation energies that are not finite",))
            except Diverged as found:
                progress = recover(job, learner, progress, found)
                event = progress.events[-1]
                on_event(event)
                bar.line(f"DIVERGED: {event}")
                bar.at(progress.epoch * per_epoch)
                if not event.healed and not progress.ended:
                    raise TrainingError(_at_the_ladders_end(job, progress)) from None
                continue
            row["seconds"] = progress.seconds
            if progress.epoch + 1 > job.settings.selection.after * epochs or progress.epoch + 1 == epochs:
                progress.select(score, progress.epoch + 1, learner)
            progress.finish_epoch(row)
            progress.save(job.state, learner)
            on_epoch(row)
            if learner.buffer is not None and (progress.epoch % math.ceil(epochs / SHOWN_CHAINS) == 0 or progress.epoch == epochs):
                on_chains(progress.epoch, _first_chains(learner.buffer, len(pool.mean)))
            shown = [n for n in (*SHOWN, "validation_clean_acc", "validation_robust_acc") if n in row]
            bar.line(f"epoch {progress.epoch}/{epochs}  " + format_values({n: row[n] for n in shown}))
    if not progress.selected.weights:  # no epochs, or ended before checkpoints compete
        progress.select(0.0, progress.epoch, learner)
    return Trained(progress.selected, progress.rows, progress.events, progress.seconds)


def _first_chains(buffer: ReplayBuffer, classes: int) -> Tensor:
    """Up to 8 chains of each of the first 10 classes, uint8 on the CPU."""
    index = torch.cat([(buffer.labels == label).nonzero()[:8, 0] for label in range(min(classes, 10))])
    return uint8_from_unit(unit_from_internal(buffer.images[index])).cpu()


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


def run_epoch(
    job: Job,
    learner: Learner,
    progress: Progress,
    data: DeviceData,
    pool: StartPool,
    bar: Bar,
    stop: StopRequest,
    on_event: Callable[[Event], None],
) -> dict[str, float]:
    """The rest of the epoch in progress; returns its row. Raises Diverged when a check finds symptoms that are to be healed."""
    method, model, optimizer = registry.METHODS[job.method], learner.model, learner.optimizer
    rungs = healing.usable(job.settings.healing.ladder, method.samples)
    settings, reseeded = healing.adjusted(job.settings, rungs[: progress.recoveries])
    salt = (reseeded,) if reseeded else ()
    learned = Step(job.method, settings, model, optimizer)
    schedule = registry.load(registry.SCHEDULES, settings.schedule.name)
    epoch, per_epoch = progress.epoch, steps_per_epoch(len(data), settings.batch_size)

    batches = epoch_batches(data, settings.batch_size, settings.augment, job.seed, epoch, progress.step, settings.own_density)
    states = draw_states(settings, learner.buffer, pool, ("chains", job.seed, epoch, *salt), progress.step, per_epoch)
    began = time.monotonic()
    for step, (batch, state) in enumerate(zip(batches, states, strict=True), progress.step):
        factor = schedule(settings.schedule, epoch * per_epoch + step, per_epoch, settings.epochs)
        for group in optimizer.param_groups:
            group["lr"] = settings.optimizer.lr * factor
        noise = generator(data.device, "step", job.seed, epoch, step, *salt)
        samples = learned.sample(batch, state, noise)
        terms = learned.update(batch, samples)
        if learner.ema is not None:
            learner.ema.update_parameters(model)
        progress.add(terms)
        progress.step = step + 1
        began, before = time.monotonic(), began
        progress.seconds += began - before
        bar.advance()
        if bar.due():
            bar.show({name: terms[name].item() for name in SHOWN if name in terms})
        if (step + 1) % settings.healing.every == 0 or step + 1 == per_epoch:
            with frozen_parameters(model, "train"), torch.no_grad():
                after = model(batch.x)
            progress.vitals = healing.vitals(terms, progress.sums, batch, samples.get("negatives"), after)
            _judge(job, progress, bar, on_event)
        if stop.asked or progress.unsaved_minutes() >= job.checkpoint_minutes:
            progress.save(job.state, learner)
        if stop.asked:
            raise KeyboardInterrupt
    row = progress.epoch_row(optimizer)  # reads values, so the device is done
    progress.seconds += time.monotonic() - began
    return row


def draw_states(
    settings: TrainingSettings, buffer: ReplayBuffer | None, pool: StartPool, purpose: tuple[int | str, ...], first: int, steps: int
) -> Iterator[SamplingState]:
    """What each of an epoch's steps draws from, from step `first` on; chains are planned some steps ahead.

    The same purpose and step give the same chains, wherever a training was interrupted.
    """
    plan = None
    for step in range(first, steps):
        if buffer is None:
            yield SamplingState(settings)
            continue
        block, within = divmod(step, PLANNED_STEPS)
        if plan is None or within == 0:
            noise, spec = generator(pool.data.device, *purpose, block), settings.chain
            planned = min(PLANNED_STEPS, steps - block * PLANNED_STEPS)
            plan = buffer.plan(planned, settings.chains, spec.reinit, starter(spec, pool), noise)
        yield SamplingState(settings, buffer, buffer.take(plan, within))


def _judge(job: Job, progress: Progress, bar: Bar, on_event: Callable[[Event], None]) -> None:
    """Raise Diverged for symptoms; where they are only to be recorded, note the first and go on as long as values are finite."""
    found = healing.symptoms(progress.vitals, job.settings.healing)
    if not found:
        return
    if job.settings.healing.mode == "heal" or not progress.vitals["finite"]:
        raise Diverged(progress.step, found)
    if not progress.events:
        progress.events.append(Event(progress.epoch + 1, progress.step, found, "recorded only", healed=False))
        on_event(progress.events[-1])
        bar.line(f"COLLAPSED: {progress.events[-1]}")


def recover(job: Job, learner: Learner, progress: Progress, found: Diverged) -> Progress:
    """Load the last healthy state, the end of an epoch, into `learner`; the last event of what is returned says how to go on.

    It has climbed one rung of the ladder; or, where collapses are only recorded, training ends there; or, after the
    ladder's end, nothing is left to try.
    """
    settings = job.settings.healing
    rungs = healing.usable(settings.ladder, registry.METHODS[job.method].samples)
    healthy = Progress.restore(job.state, learner, healthy=True)
    healthy.seconds = progress.seconds
    healthy.ended = settings.mode == "record"
    healed = False
    if healthy.ended:
        action = f"ended with the state of epoch {healthy.epoch}"
    elif progress.recoveries < len(rungs):
        healed, action = True, f"back to the end of epoch {healthy.epoch}, {healing.describe(rungs[progress.recoveries])}"
    else:
        action = "nothing is left on the ladder"
    healthy.events = [*progress.events, Event(progress.epoch + 1, found.step, found.symptoms, action, healed)]
    if healed or healthy.ended:
        healthy.save(job.state, learner)
    return healthy


def _at_the_ladders_end(job: Job, progress: Progress) -> str:
    *tried, last = progress.events
    lines = "".join(f"\n  {i}. {event}" for i, event in enumerate(tried, 1)) or "\n  nothing: healing.ladder is empty"
    chains = "add chain steps, " if "negatives" in registry.METHODS[job.method].samples else ""
    return (
        f"{job.title}: diverged in epoch {last.epoch}, step {last.step}: {'; '.join(last.symptoms)}. This was tried before:{lines}\n"
        f"Lower optimizer.lr, {chains}or extend healing.ladder, and run again: with changed settings this training starts anew. "
        f"Its healthy state of epoch {progress.epoch} stays in {job.state}; results of other experiments are not touched."
    )


def validate(learner: Learner, job: Job, validation: DeviceData, row: dict[str, float]) -> float:
    """Add validation accuracies, also of the averaged weights, and the mean energy to the row.

    Returns the raw weights' score, which selects.
    """
    wanted = job.settings.selection.score or registry.METHODS[job.method].selection
    robust = wanted != "clean"
    networks: dict[str, nn.Module] = {"": learner.model}
    if learner.ema is not None:
        networks["ema_"] = learner.ema.module
    for prefix, network in networks.items():
        for name, value in validation_scores(network, job.settings, validation, robust).items():
            row[f"{prefix}validation_{name}"] = value
    if wanted != "clean_and_robust":
        return row[f"validation_{wanted}_acc"]
    return (row["validation_clean_acc"] + row["validation_robust_acc"]) / 2


def validation_scores(model: nn.Module, settings: TrainingSettings, validation: DeviceData, robust: bool) -> dict[str, float]:
    """Clean accuracy, mean E(x), and if asked for the accuracy under a 10-step projected gradient on cross-entropy.

    The gradient's radius is the settings' in [0, 1] pixels. All in eval mode.
    """
    plain = {"score": "ce", "steps": 10, "mode": "eval", "start": "uniform", "project": True, "range": "unit"}
    attack = settings.adversary.model_copy(update=plain)
    correct = {"clean_acc": 0, "robust_acc": 0}
    energy = 0.0
    for start in range(0, len(validation), VALIDATION_BATCH):
        index = slice(start, start + VALIDATION_BATCH)
        x, y = validation.internal(index), validation.labels[index]
        with evaluating(model):
            logits = model(x)
            correct["clean_acc"] += int((predicted(logits) == y).sum())
            energy += float(marginal_energy(logits).sum())
        if robust:
            x = neighbours(model, x, y, attack, generator(validation.device, "validation", start))
            with evaluating(model):
                correct["robust_acc"] += int((predicted(model(x)) == y).sum())
    found = {name: n / len(validation) for name, n in correct.items() if name == "clean_acc" or robust}
    return {**found, "energy": energy / len(validation)}


class Progress:
    """Where a training is; with the learner's state, everything that a killed one needs to continue bit for bit.

    Ends of epochs, which were checked to be healthy, are kept in one file, what lies between in another; so the state that
    a diverged training goes back to does not depend on when it was saved or killed.
    """

    def __init__(self) -> None:
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch in progress
        self.seconds = 0.0
        self.ended = False  # stopped before its last epoch, where collapses are only recorded
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Tensor] = {}
        self.vitals: dict[str, float] = {}
        self.events: list[Event] = []
        self.selected = Selected()
        self._saved = time.monotonic()

    @property
    def recoveries(self) -> int:
        return sum(event.healed for event in self.events)

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def epoch_row(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        row = {"epoch": float(self.epoch + 1), "lr": optimizer.param_groups[0]["lr"]}
        row |= {name: float(total) / self.step for name, total in self.sums.items()}
        return row | {f"health_{name}": value for name, value in self.vitals.items() if name != "finite"}

    def finish_epoch(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def select(self, score: float, epoch: int, learner: Learner) -> None:
        if score < self.selected.score:
            return
        self.selected = Selected(score, epoch, _on_cpu(learner.model))
        if learner.ema is not None:
            self.selected.ema = _on_cpu(learner.ema.module)
        if learner.buffer is not None:
            self.selected.buffer = uint8_from_unit(unit_from_internal(learner.buffer.images)).cpu()
            self.selected.buffer_labels = learner.buffer.labels.cpu().clone()

    def unsaved_minutes(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def save(self, folder: Path, learner: Learner) -> None:
        content: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "ended": self.ended,
            "rows": self.rows,
            "sums": self.sums,
            "vitals": self.vitals,
            "events": [vars(event) for event in self.events],
            "selected": vars(self.selected),
            **learner.state(),
        }
        write_atomic(folder / (WITHIN_EPOCH if self.step else END_OF_EPOCH), lambda temporary: _write(content, temporary))
        self._saved = time.monotonic()

    @classmethod
    def restore(cls, folder: Path, learner: Learner, healthy: bool = False) -> Progress:
        """The saved progress, loaded into the learner; a fresh one when nothing was saved.

        healthy: the last end of an epoch; TrainingError when there is none.
        """
        progress = cls()
        device = next(learner.model.parameters()).device
        content = _read(folder / END_OF_EPOCH, device)
        if content is None:
            if healthy:
                raise TrainingError(f"{folder / END_OF_EPOCH}: the state to go back to is gone; run again, training starts anew")
            return progress
        try:
            within = None if healthy or content["ended"] else _read(folder / WITHIN_EPOCH, device)
            if within is not None and (within["epoch"], _recoveries(within)) == (content["epoch"], _recoveries(content)):
                content = within  # else it is from an epoch that was finished or given up since
            learner.load(content)
            progress.epoch, progress.step, progress.ended = content["epoch"], content["step"], content["ended"]
            progress.seconds, progress.rows, progress.sums = content["seconds"], content["rows"], content["sums"]
            progress.vitals = content["vitals"]
            progress.events = [Event(**{**event, "symptoms": tuple(event["symptoms"])}) for event in content["events"]]
            progress.selected = Selected(**{name: _to_cpu(value) for name, value in content["selected"].items()})
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = brief(f"{type(error).__name__}: {error}", 200)
            raise TrainingError(f"{folder}: not a training's state ({why}); delete the folder to start again") from error
        return progress


END_OF_EPOCH, WITHIN_EPOCH = "epoch.pt", "step.pt"


def _recoveries(content: Mapping[str, Any]) -> int:
    return sum(event["healed"] for event in content["events"])


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_cpu(item) for name, item in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _write(content: Mapping[str, Any], path: Path) -> None:
    """Raises OSError where the disk refuses, e.g. when it is full: torch itself raises RuntimeError, which says nothing of it."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """A state file's content, None when there is none. Raises TrainingError for a damaged one."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a checksum of each part, but does not look at it
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(part)
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError("no mapping")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and its unpickler throw almost anything at bytes that are not theirs
        raise TrainingError(f"{path}: damaged training state ({type(error).__name__}); delete it to start again") from error
    return content
