"""What a training changes, and how a killed one continues from its files bit for bit."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ebjdat import registry
from ebjdat.data.batches import generator, steps_per_epoch
from ebjdat.errors import UserError, brief
from ebjdat.files import write_atomic
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.terms import MethodState, Terms
from ebjdat.pixels import uint8_from_unit, unit_from_internal
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.chains import starter
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import TrainingSettings
from ebjdat.training.averaging import averaged
from ebjdat.training.healing import Event

END_OF_EPOCH, WITHIN_EPOCH = "epoch.pt", "step.pt"


class TrainingError(UserError):
    """Training cannot continue; says why and what to change."""


@dataclass(frozen=True)
class Job:
    """One training: what to minimise, with which settings; `seed` determines the rest."""

    title: str
    method: str
    settings: TrainingSettings
    seed: int
    state: Path  # folder of the resumable state; without it training starts again
    checkpoint_minutes: float = 5.0


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
class Learner:
    """Everything that a training step changes.

    buffer: for methods with chains. ema: averaged weights, if the settings ask for them. own: what only the method knows.
    """

    model: WideResNet
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer | None
    ema: AveragedModel | None
    own: MethodState | None = None

    @classmethod
    def of(cls, model: WideResNet, job: Job, pool: StartPool) -> Learner:
        settings, device = job.settings, pool.data.device
        optimizer = registry.load(registry.OPTIMIZERS, settings.optimizer.name)(model.parameters(), settings.optimizer)
        buffer = None
        if registry.METHODS[job.method].has_chains:
            noise, start = generator(device, "buffer", job.seed), starter(settings.chain, pool)
            buffer = ReplayBuffer.fresh(settings.chain.buffer, len(pool.mean), start, device, noise)
        steps = settings.epochs * steps_per_epoch(len(pool.data), settings.batch_size)
        factory = registry.METHODS[job.method].state
        own = registry.implementation(factory)(model, settings, job.seed) if factory else None
        return cls(model, optimizer, buffer, averaged(model, settings, steps), own)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.images,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "own": None if self.own is None else self.own.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.buffer is not None:
            self.buffer.images.copy_(state["buffer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.own is not None:
            self.own.load_state_dict(state["own"])

    def first_chains(self, classes: int) -> Tensor:
        """Up to 8 chains of the buffer from each of the first 10 classes, uint8 on the CPU."""
        assert self.buffer is not None
        index = torch.cat([(self.buffer.labels == label).nonzero()[:8, 0] for label in range(min(classes, 10))])
        return uint8_from_unit(unit_from_internal(self.buffer.images[index])).cpu()


@dataclass
class TrainingState:
    """Where a training is. With the learner's state, this is everything that a killed training needs to continue bit for bit.

    One file holds the last end of an epoch, which was checked to be healthy, another what lies between. So the state to which
    a diverged training goes back does not depend on when it was saved or killed.
    """

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the epoch in progress
    seconds: float = 0.0
    ended: bool = False  # stopped before its last epoch, where collapses are only recorded
    rows: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the epoch's terms so far
    vitals: dict[str, float] = field(default_factory=dict)  # of the last check
    most_robust: float = 0.0  # best accuracy under attack of the training images that checks follow
    events: list[Event] = field(default_factory=list)
    selected: Selected = field(default_factory=Selected)
    _saved: float = field(default_factory=time.monotonic, init=False)

    @property
    def recoveries(self) -> int:
        return sum(event.healed for event in self.events)

    def add(self, terms: Terms) -> None:
        for name, value in terms.scalars().items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def follow(self, accuracy: float) -> dict[str, float]:
        """Vitals of the training images that checks follow: their accuracy under attack, and how far it lies below its best."""
        self.most_robust = max(self.most_robust, accuracy)
        return {"robust_acc": accuracy, "overfitting": self.most_robust - accuracy}

    def epoch_row(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        row = {"epoch": float(self.epoch + 1), "lr": optimizer.param_groups[0]["lr"]}
        row |= {name: float(total) / self.step for name, total in self.sums.items()}
        return row | {f"health_{name}": value for name, value in self.vitals.items() if name != "finite"}

    def finish_epoch(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def select(self, score: float, epoch: int, learner: Learner) -> None:
        """Keep the learner's weights and buffer, unless an earlier epoch scored higher."""
        if score < self.selected.score:
            return
        self.selected = Selected(score, epoch, _cpu_copy(learner.model))
        if learner.ema is not None:
            self.selected.ema = _cpu_copy(learner.ema.module)
        if learner.buffer is not None:
            self.selected.buffer = uint8_from_unit(unit_from_internal(learner.buffer.images)).cpu()
            self.selected.buffer_labels = learner.buffer.labels.cpu().clone()

    def unsaved_minutes(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def save(self, folder: Path, learner: Learner) -> None:
        """Write this and the learner's state. Raises OSError where the disk refuses."""
        content = {f.name: vars(self)[f.name] for f in fields(self) if f.init} | learner.state()
        content |= {"events": [vars(event) for event in self.events], "selected": vars(self.selected)}
        write_atomic(folder / (WITHIN_EPOCH if self.step else END_OF_EPOCH), lambda temporary: _write(content, temporary))
        self._saved = time.monotonic()

    @classmethod
    def restore(cls, folder: Path, learner: Learner, healthy: bool = False) -> TrainingState:
        """The saved state, loaded into the learner; a fresh one when nothing was saved.

        healthy: the last end of an epoch. Raises TrainingError when there is none, or for a file that is damaged or not a state.
        """
        device = next(learner.model.parameters()).device
        content = _read(folder / END_OF_EPOCH, device)
        if content is None:
            if healthy:
                raise TrainingError(f"{folder / END_OF_EPOCH}: the healthy state is missing; rerun, and training starts anew")
            return cls()
        try:
            within = None if healthy or content["ended"] else _read(folder / WITHIN_EPOCH, device)
            if within is not None and (within["epoch"], _recoveries(within)) == (content["epoch"], _recoveries(content)):
                content = within  # else it is from an epoch that was finished or abandoned since
            learner.load(content)
            events = [Event(**{**event, "symptoms": tuple(event["symptoms"])}) for event in content["events"]]
            selected = Selected(**{name: _to_cpu(value) for name, value in content["selected"].items()})
            values = {**content, "events": events, "selected": selected}
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.init})
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = brief(f"{type(error).__name__}: {error}", 200)
            raise TrainingError(f"{folder}: not a training's state ({why}); delete the folder to start again") from error


def _recoveries(content: Mapping[str, Any]) -> int:
    return sum(event["healed"] for event in content["events"])


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_cpu(item) for name, item in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _write(content: Mapping[str, Any], path: Path) -> None:
    """torch.save, but OSError where the disk refuses, e.g. when it is full; torch raises RuntimeError, which does not say so."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """A state file's content; None when there is no file. Raises TrainingError for a damaged one."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a checksum of each part, but does not check it
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(part)
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError("not a mapping")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and its unpickler raise almost anything at bytes that they did not write
        raise TrainingError(f"{path}: damaged training state ({type(error).__name__}); delete it to start again") from error
    return content
