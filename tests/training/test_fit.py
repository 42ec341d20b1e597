"""Training without the workflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import build
from ebjdat.settings import ModelSettings, TrainingSettings
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import CheckpointError
from ebjdat.training.fit import train_checkpoint
from ebjdat.training.loop import Hooks, train
from ebjdat.training.state import Job
from tests.training.conftest import changed

MODEL, CPU = ModelSettings(depth=10, width=1), torch.device("cpu")


def test_a_checkpoint_holds_what_the_loop_selected(digits: Prepared, settings: TrainingSettings, tmp_path: Path) -> None:
    """Against the loop, called by hand; stopped once, which must not change a bit. Nothing but the checkpoint is left."""
    few = replace(digits, train=digits.train[:256])
    settings = changed(settings, epochs=2)

    def stop(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "mine.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_checkpoint("eb_jdat", MODEL, settings, few, out, seed=3, hooks=Hooks(epoch=stop))
    rows: list[float] = []
    made = train_checkpoint("eb_jdat", MODEL, settings, few, out, seed=3, hooks=Hooks(epoch=lambda row: rows.append(row["epoch"])))
    assert rows == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"]
    loaded = checkpoint.load(out, data_hash=digits.data_hash, model=MODEL, method="eb_jdat", classes=digits.classes)
    assert loaded.header == made.header
    assert loaded.header.metrics["epochs"] == 2

    job, mean = Job("t", "eb_jdat", settings, 3, tmp_path / "state"), torch.from_numpy(digits.class_mean)
    network = build(MODEL, 1, 10, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    selected = train(network, job, DeviceData(few, "train", CPU), DeviceData(few, "validation", CPU), mean).selected
    assert all(torch.equal(loaded.weights[name], value) for name, value in selected.weights.items())
    assert loaded.buffer is not None
    assert selected.buffer is not None
    assert torch.equal(loaded.buffer, selected.buffer)


def test_it_starts_from_a_checkpoint_that_fits(digits: Prepared, settings: TrainingSettings, tmp_path: Path) -> None:
    untrained, start = changed(settings, epochs=0), tmp_path / "a.safetensors"
    first = train_checkpoint("classifier", MODEL, untrained, digits, start, seed=1)
    second = train_checkpoint("classifier", MODEL, untrained, digits, tmp_path / "b.safetensors", initial=start)
    assert all(torch.equal(first.weights[name], value) for name, value in second.weights.items())
    wider = ModelSettings(depth=10, width=2)
    with pytest.raises(CheckpointError, match=r"holds another network: width 1 \(settings: 2\)"):
        train_checkpoint("classifier", wider, untrained, digits, tmp_path / "c.safetensors", initial=start)
