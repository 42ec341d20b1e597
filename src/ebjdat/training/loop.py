"""The training loop: draw, loss, update; validate; keep what was selected. Knows methods only by their registry entry."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.data.batches import DeviceData, epoch_batches, generator, steps_per_epoch
from ebjdat.data.sources import DataError
from ebjdat.errors import UserError
from ebjdat.files import write_atomic
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.draws import DrawState, neighbours
from ebjdat.params import TrainingSettings
from ebjdat.pixels import uint8_from_unit, unit_from_internal
from ebjdat.progress import Bar, format_values
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.starts import StartPool

SHOWN = ("loss", "batch_acc_clean", "batch_acc_robust", "energy_clean", "energy_adversarial", "energy_generated")
VALIDATION_BATCH = 250


class TrainingError(UserError):
    """Training cannot go on; says why and what to change."""


@dataclass
class Selected:
    """The best checkpoint so far by the validation score; a later one wins a tie."""

    score: float = -1.0
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffer: Tensor | None = None  # uint8 (N, C, H, W)
    buffer_labels: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    selected: Selected
    rows: list[dict[str, float]]  # one per epoch: means over its steps, validation scores, learning rate, seconds
    seconds: float


@dataclass(frozen=True)
class Job:
    """One training: what to minimise, with which settings, on which data; `seed` determines the rest."""

    title: str
    method: str
    settings: TrainingSettings
    seed: int
    state_file: Path  # resumable state; deleting it starts again
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


@contextmanager
def evaluating(model: WideResNet) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def train(
    model: WideResNet,
    job: Job,
    train_data: DeviceData,
    validation: DeviceData,
    class_mean: Tensor,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> Trained:
    """Train `model` in place; return the checkpoint that validation selected.

    class_mean: (K, C, H, W) in [0, 1], for chain starts. on_epoch: called with each finished epoch's row, and, when a
    stopped training is continued, with the rows that were finished before. Raises DataError when a batch does not fit
    the training split, TrainingError when the loss is not finite.
    """
    settings, method, device = job.settings, registry.METHODS[job.method], train_data.device
    per_epoch = steps_per_epoch(len(train_data), settings.batch_size)
    if settings.epochs and not per_epoch:
        raise DataError(f"batch_size is {settings.batch_size}, but the training split has only {len(train_data)} images")
    if settings.augment.pad >= train_data.images.shape[-1]:
        raise DataError(f"augment.pad is {settings.augment.pad}, images have {train_data.images.shape[-1]} pixels; reflection needs less")
    loss = registry.load(registry.METHODS, job.method)
    draws = {name: registry.load(registry.DRAWS, name) for name in method.draws}
    update = registry.load(registry.UPDATES, settings.update)
    schedule = registry.load(registry.SCHEDULES, settings.schedule.name)
    optimizer = registry.load(registry.OPTIMIZERS, settings.optimizer.name)(model.parameters(), settings.optimizer)
    pool = StartPool.of(train_data, class_mean)
    state = DrawState(settings, pool, None)
    if "negatives" in method.draws:
        noise = generator(device, "buffer", job.seed)
        state = DrawState(settings, pool, ReplayBuffer.fresh(settings.chain.buffer, len(class_mean), state.start, device, noise))

    progress = Progress.restore(job.state_file, model, optimizer, state.buffer)
    for row in progress.rows:
        on_epoch(row)
    done = progress.epoch * per_epoch + progress.step
    with Bar(job.title, settings.epochs * per_epoch, done) as bar, StopRequest() as stop:
        if progress.epoch or progress.step:
            bar.line(f"continues at epoch {progress.epoch + 1}, step {progress.step}")
        model.train()
        for epoch in range(progress.epoch, settings.epochs):
            for step, batch in enumerate(epoch_batches(train_data, settings.batch_size, settings.augment, job.seed, epoch)):
                if step < progress.step:
                    continue
                began = time.monotonic()
                factor = schedule(settings.schedule, epoch * per_epoch + step, per_epoch, settings.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = settings.optimizer.lr * factor
                noise = generator(device, "step", job.seed, epoch, step)
                drawn = {name: draw(model, batch, state, noise) for name, draw in draws.items()}
                terms = update(optimizer, lambda b=batch, d=drawn: loss(model, b, d, settings.weights))
                progress.add(terms)
                progress.step = step + 1
                progress.seconds += time.monotonic() - began
                bar.advance()
                if bar.due():
                    bar.show({name: terms[name].item() for name in SHOWN if name in terms})
                if stop.asked or progress.unsaved_minutes() >= job.checkpoint_minutes:
                    progress.check(job)
                    progress.save(job.state_file, model, optimizer, state.buffer)
                if stop.asked:
                    raise KeyboardInterrupt

            progress.check(job)
            row = progress.epoch_row(optimizer)
            began = time.monotonic()
            score = validate(model, job, validation, row)
            progress.seconds += time.monotonic() - began
            row["seconds"] = progress.seconds
            if epoch + 1 > settings.selection.after * settings.epochs or epoch + 1 == settings.epochs:
                progress.select(score, epoch + 1, model, state.buffer)
            progress.finish_epoch(row)
            progress.save(job.state_file, model, optimizer, state.buffer)
            on_epoch(row)
            shown = [n for n in (*SHOWN, "validation_acc_clean", "validation_acc_robust") if n in row]
            bar.line(f"epoch {epoch + 1}/{settings.epochs}  " + format_values({n: row[n] for n in shown}))
    if not settings.epochs:
        progress.select(0.0, 0, model, state.buffer)
    return Trained(progress.selected, progress.rows, progress.seconds)


def validate(model: WideResNet, job: Job, validation: DeviceData, row: dict[str, float]) -> float:
    """Add validation accuracies to the row; return the score that selects checkpoints."""
    settings = job.settings
    wanted = settings.selection.score or registry.METHODS[job.method].selection
    attack = settings.adversary.model_copy(update={"score": "ce", "steps": 10, "mode": "eval"})
    clean = robust = 0
    for start in range(0, len(validation), VALIDATION_BATCH):
        index = slice(start, start + VALIDATION_BATCH)
        x, y = validation.internal(index), validation.labels[index]
        with evaluating(model):
            clean += int((model(x).argmax(1) == y).sum())
        if wanted != "clean":
            x = neighbours(model, x, y, attack, generator(validation.device, "validation", start))
            with evaluating(model):
                robust += int((model(x).argmax(1) == y).sum())
    row["validation_acc_clean"] = clean / len(validation)
    if wanted == "clean":
        return row["validation_acc_clean"]
    row["validation_acc_robust"] = robust / len(validation)
    if wanted == "robust":
        return row["validation_acc_robust"]
    return (row["validation_acc_clean"] + row["validation_acc_robust"]) / 2


class Progress:
    """Where a training is; everything that a killed one needs to continue bit for bit."""

    def __init__(self) -> None:
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch in progress
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Tensor] = {}
        self.selected = Selected()
        self._saved = time.monotonic()

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def check(self, job: Job) -> None:
        """Raise TrainingError when the epoch's sums are not finite, before a state that holds such values is saved."""
        wrong = {name: float(total) for name, total in self.sums.items() if not torch.isfinite(total)}
        if wrong:
            raise TrainingError(
                f"{job.title}: epoch {self.epoch + 1}, by step {self.step}: values that are not finite ({', '.join(wrong)}). Lower "
                f"optimizer.lr, add chain steps, or try another seed; the last finite state is kept in {job.state_file.parent}."
            )

    def epoch_row(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        row = {"epoch": float(self.epoch + 1), "lr": optimizer.param_groups[0]["lr"]}
        return row | {name: float(total) / self.step for name, total in self.sums.items()}

    def finish_epoch(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def select(self, score: float, epoch: int, model: WideResNet, buffer: ReplayBuffer | None) -> None:
        if score < self.selected.score:
            return
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        self.selected = Selected(score, epoch, weights)
        if buffer is not None:
            self.selected.buffer = uint8_from_unit(unit_from_internal(buffer.images)).cpu()
            self.selected.buffer_labels = buffer.labels.cpu().clone()

    def unsaved_minutes(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def save(self, path: Path, model: WideResNet, optimizer: torch.optim.Optimizer, buffer: ReplayBuffer | None) -> None:
        content: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "sums": self.sums,
            "selected": vars(self.selected),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "buffer": None if buffer is None else buffer.images,
        }
        write_atomic(path, lambda temporary: torch.save(content, temporary))
        self._saved = time.monotonic()

    @classmethod
    def restore(cls, path: Path, model: WideResNet, optimizer: torch.optim.Optimizer, buffer: ReplayBuffer | None) -> Progress:
        """The saved progress, loaded into model, optimizer and buffer; a fresh one when nothing was saved."""
        progress = cls()
        if not path.exists():
            return progress
        device = next(model.parameters()).device
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{path}: damaged training state ({type(error).__name__}); delete it to start again") from error
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        if buffer is not None:
            buffer.images.copy_(content["buffer"])
        progress.epoch, progress.step = content["epoch"], content["step"]
        progress.seconds, progress.rows, progress.sums = content["seconds"], content["rows"], content["sums"]
        progress.selected = Selected(**content["selected"])
        return progress
