"""Training without the workflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.errors import DataError
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


def test_extra_images_are_trained_on_where_a_share_of_them_is_asked_for(
    digits: Prepared, settings: TrainingSettings, tmp_path: Path
) -> None:
    """Share 0: the weights without them, bit for bit. Stopped in between: the same weights. Their labels matter."""
    few = replace(digits, train=digits.train[:256])
    images, labels = digits.split("validation", 100)
    more = replace(few, extra_images=images, extra_labels=labels)

    def trained(name: str, data: Prepared, hooks: Hooks | None = None, **extra: object) -> dict[str, torch.Tensor]:
        made = train_checkpoint("pgd_at", MODEL, changed(settings, epochs=2, extra=extra), data, tmp_path / f"{name}.st", hooks=hooks)
        return made.weights

    def stop(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    without, none, some = trained("without", few), trained("none", more, share=0), trained("some", more, share=0.5)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", more, Hooks(epoch=stop), share=0.5)
    stopped, shuffled = trained("stopped", more, share=0.5), trained("shuffled", more, share=0.5, shuffled_labels=True)
    assert all(torch.equal(none[name], value) for name, value in without.items())
    assert all(torch.equal(stopped[name], value) for name, value in some.items())
    for other in (without, shuffled):
        assert not torch.equal(some["head.weight"], other["head.weight"])
    with pytest.raises(DataError, match="the data have no extra images"):
        trained("nothing", few, share=0.5)
