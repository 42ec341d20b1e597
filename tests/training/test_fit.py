"""Training without the workflow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.errors import DataError
from ebjdat.models.weights import ModelError
from ebjdat.models.wrn import build
from ebjdat.settings import ModelSettings, TrainingSettings
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import CheckpointError
from ebjdat.training.fit import train_checkpoint
from ebjdat.training.loop import Hooks, train
from ebjdat.training.state import Job, TrainingError
from tests.training.conftest import METHODS, changed

MODEL, CPU = ModelSettings(depth=10, width=1), torch.device("cpu")


@pytest.mark.slow
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


def test_a_student_learns_from_its_teachers_checkpoint_and_from_a_network_from_elsewhere(
    digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights by both ways give the same student; another teacher, another; the teacher stays as it is."""
    small = replace(digits, train=digits.train[:128])
    plain = changed(METHODS.training_settings("pgd_at"), epochs=1)
    for seed in (1, 2):
        train_checkpoint("pgd_at", MODEL, plain, small, tmp_path / f"teacher{seed}.safetensors", seed=seed)
    before = (tmp_path / "teacher1.safetensors").read_bytes()
    settings = changed(METHODS.training_settings("iad"), epochs=2)
    learn = partial(train_checkpoint, "iad", MODEL, data=small, seed=0)
    students = [
        learn(training=settings, out=tmp_path / f"student{i}.safetensors", teacher=tmp_path / f"teacher{of}.safetensors").weights
        for i, of in enumerate((1, 1, 2))
    ]
    (tmp_path / "elsewhere.py").write_text(
        "import ebjdat\n\n\ndef network():\n    return ebjdat.load_checkpoint('teacher1.safetensors')[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    elsewhere = changed(settings, teacher={"model": "elsewhere:network", "experiment": None})
    students.append(learn(training=elsewhere, out=tmp_path / "student3.safetensors").weights)
    apart = [max(float((value - student[name]).abs().max()) for name, value in students[0].items()) for student in students]
    assert apart[:2] == [0, 0]
    assert apart[3] < apart[2] / 20  # its images were scaled to [0, 1] and back, which rounds
    assert (tmp_path / "teacher1.safetensors").read_bytes() == before


def test_a_teacher_of_other_images_or_classes_is_refused(digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign.py").write_text(
        "import torch\n\n\ndef flat():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))\n"
        "\n\ndef colour():\n    return torch.nn.Conv2d(3, 10, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    for model, problem in (("flat", r"foreign:flat gives \(2, 3\) for 2 images; these data have 10 classes"), ("colour", "cannot take")):
        settings = changed(METHODS.training_settings("ard"), epochs=1, teacher={"model": f"foreign:{model}", "experiment": None})
        with pytest.raises(TrainingError, match=problem):
            train_checkpoint("ard", MODEL, settings, digits, tmp_path / "x.safetensors")
    lost = {"model": "foreign:flat", "experiment": None, "weights": "lost.pt"}  # not trained on as it is without them
    with pytest.raises(ModelError, match=r"lost\.pt"):
        train_checkpoint("ard", MODEL, changed(METHODS.training_settings("ard"), teacher=lost), digits, tmp_path / "x.safetensors")
    with pytest.raises(TrainingError, match="the checkpoint of trades is needed; give it with --teacher"):
        train_checkpoint("ard", MODEL, METHODS.training_settings("ard"), digits, tmp_path / "x.safetensors")
    other, start = replace(digits, data_hash="other"), tmp_path / "other.safetensors"
    train_checkpoint("classifier", MODEL, changed(METHODS.training_settings("pgd_at"), epochs=0), other, start)
    with pytest.raises(CheckpointError, match="data"):
        train_checkpoint("ard", MODEL, METHODS.training_settings("ard"), digits, tmp_path / "x.safetensors", teacher=start)


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
