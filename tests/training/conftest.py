"""Small trainings that tests compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import build
from ebjdat.settings import ModelSettings, TrainingSettings, load, merge
from ebjdat.training.healing import Event
from ebjdat.training.loop import Hooks, train
from ebjdat.training.state import Job, TrainingState
from tests.conftest import ROOT

FULL, METHODS = (load(ROOT / f"params/{name}.yaml") for name in ("digits-full", "digits-methods"))


def run(
    digits: Prepared,
    settings: TrainingSettings,
    state: Path,
    method: str = "eb_jdat",
    minutes: float = 1e9,
    events: list[Event] | None = None,
    seed: int = 0,
) -> TrainingState:
    """A training of 4 steps per epoch from fixed weights."""
    cpu = torch.device("cpu")
    model = build(ModelSettings(depth=10, width=1), 1, 10, 0)
    job = Job("test", method, settings, seed, state, minutes)
    data, validation = DeviceData(digits, "train", cpu, 256), DeviceData(digits, "validation", cpu)
    hooks = Hooks(event=[].append if events is None else events.append)
    return train(model, job, data, validation, torch.from_numpy(digits.class_mean), hooks)


def run_with_stops(digits: Prepared, settings: TrainingSettings, state: Path, method: str = "eb_jdat") -> tuple[TrainingState, int]:
    """The same training, saved after every step and stopped at every save; and how many saves there were."""
    saves = 0

    def save_and_stop(self: TrainingState, *arguments: Any) -> None:
        nonlocal saves
        save(self, *arguments)
        saves += 1
        raise KeyboardInterrupt

    save = TrainingState.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "save", save_and_stop)
        for _ in range(100):
            try:
                return run(digits, settings, state, method, minutes=0.0), saves
            except KeyboardInterrupt:
                continue
    pytest.fail("it never ends")


def changed(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(merge(settings.model_dump(), changes))


def same(first: TrainingState, second: TrainingState) -> bool:
    pairs = [(first.selected.weights[k], second.selected.weights[k]) for k in first.selected.weights]
    pairs += [(first.selected.buffer, second.selected.buffer)] if first.selected.buffer is not None else []  # type: ignore[list-item]
    return all(torch.equal(a, b) for a, b in pairs)


def spy(monkeypatch: pytest.MonkeyPatch, target: object, name: str, note: Callable[..., object]) -> list[Any]:
    """What `note` makes of each call's arguments; the real function runs."""
    seen: list[Any] = []
    real = getattr(target, name)

    def call(*arguments: Any, **named: Any) -> Any:
        seen.append(note(*arguments, **named))
        return real(*arguments, **named)

    monkeypatch.setattr(target, name, call)
    return seen
