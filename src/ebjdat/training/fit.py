"""From prepared data to a checkpoint, without the workflow's files: what the training stages and programs call."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.files import digest, git_commit
from ebjdat.models import wrn
from ebjdat.settings import ModelSettings, TrainingSettings
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint, Header
from ebjdat.training.healing import Event
from ebjdat.training.loop import Hooks, train
from ebjdat.training.state import Job, TrainingState
from ebjdat.training.teacher import Teacher


@dataclass(frozen=True)
class Provenance:
    """What made a checkpoint. code: digest of what the training could execute."""

    run: str
    params_hash: str
    git_commit: str
    code: str = ""


def fit(
    job: Job,
    model: ModelSettings,
    data: Prepared,
    device: torch.device,
    initial: Path | None = None,
    code: str = "",
    hooks: Hooks | None = None,
    teacher: Path | None = None,
) -> TrainingState:
    """Train a network from the checkpoint `initial`, or from the job's seed; return the last state.

    teacher: file of the weights of the network that the settings name as teacher, if they do and it needs one.

    Continues from a folder in `job.state` if it was made by the same `code`, from the same settings and inputs, on the same
    machine. Raises CheckpointError when `initial` does not fit, otherwise as `Teacher.load` and `loop.train`.
    """
    network = wrn.build(model, data.image_shape[0], len(data.classes), job.seed)
    if initial is not None:
        start = checkpoint.load(initial, data_hash=data.data_hash, model=model, image_shape=data.image_shape, classes=data.classes)
        network.load_state_dict(start.weights)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    machine = [str(device), torch.get_num_threads(), torch.__version__]
    taught = Teacher.load(job.settings.teacher, teacher, data, device) if job.settings.teacher else None
    inputs = [data.data_hash, *([initial] if initial else []), code, *([taught.digest] if taught else [])]
    made_from = digest(job.method, job.settings.model_dump(), model.model_dump(), job.seed, machine, *inputs)
    job = replace(job, state=job.state / made_from[:16])
    training, validation = DeviceData(data, "train", device), DeviceData(data, "validation", device)
    extra = DeviceData(data, "extra", device) if job.settings.extra.share else None
    network_of = taught.network if taught else None
    return train(network, job, training, validation, torch.from_numpy(data.class_mean), hooks, network_of, extra)


def divergences(events: Sequence[Event]) -> dict[str, float]:
    """How often training went back, and the epoch in which it first diverged, if it did."""
    return {"recoveries": sum(event.healed for event in events), **({"collapse_epoch": events[0].epoch} if events else {})}


def to_checkpoint(job: Job, model: ModelSettings, data: Prepared, state: TrainingState, seconds: str, made_by: Provenance) -> Checkpoint:
    """The selected weights and what explains them. seconds: the metric's name of the training's time."""
    selected = state.selected
    metrics: dict[str, float] = {
        seconds: round(state.seconds, 3),
        "selected_epoch": selected.epoch,
        "selection_score": selected.score,
        "epochs": len(state.rows),
        "n_validation": len(data.validation),
        "n_train": len(data.train),
        **divergences(state.events),
    }
    header = Header(
        title=job.title,
        method=job.method,
        seed=job.seed,
        model=model,
        training=job.settings,
        image_shape=data.image_shape,
        classes=data.classes,
        data_hash=data.data_hash,
        metrics=metrics,
        events=tuple(map(str, state.events)),
        **vars(made_by),
    )
    return Checkpoint(header, selected.weights, selected.buffer, selected.buffer_labels, selected.ema)


def train_checkpoint(
    method: str,
    model: ModelSettings,
    training: TrainingSettings,
    data: Prepared,
    out: Path,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    initial: Path | None = None,
    code: str = "",
    hooks: Hooks | None = None,
    teacher: Path | None = None,
) -> Checkpoint:
    """Train a method on prepared data and write its checkpoint to `out`. The same arguments give the same weights.

    Its state lies beside `out` until that is written; a killed training continues from it, if it was made by the same `code`.
    device: the CPU by default. teacher: as for `fit`. Raises DataError, CheckpointError and TrainingError as `fit`.
    """
    job = Job(out.stem, method, training, seed, out.with_name(f".{out.name}.state"))
    state = fit(job, model, data, device or torch.device("cpu"), initial, code, hooks, teacher)
    params_hash = digest(method, model.model_dump(), training.model_dump(), seed)[:16]
    seconds = "finetune_seconds" if initial else "pretrain_seconds"
    made = to_checkpoint(job, model, data, state, seconds, Provenance(job.title, params_hash, git_commit(), code))
    checkpoint.save(made, out)
    shutil.rmtree(job.state, ignore_errors=True)
    return made
