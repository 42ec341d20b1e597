"""Stages `pretrain` and `finetune`: data (and a checkpoint) -> checkpoint, metrics, curves."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.files import digest, git_commit, write_result, write_text
from ebjdat.jobs import STAGES
from ebjdat.models import wrn
from ebjdat.settings import ModelSettings
from ebjdat.stages.context import Context, alone
from ebjdat.tracking.tracker import Subject, Tracker
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint, Header
from ebjdat.training.healing import Event
from ebjdat.training.loop import Job, Trained, TrainingError, train


@dataclass(frozen=True)
class Outputs:
    checkpoint: Path
    metrics: Path
    curve: Path


def pretrain(context: Context, name: str, seed: int, data_path: Path, out: Outputs, threads: int | None) -> None:
    """Train (or, for 0 epochs, only initialise) the checkpoint that several experiments start from."""
    entry, settings = context.profile.pretraining[name], context.profile.pretraining_settings(name)
    data = prepared.load(data_path)
    subject = Subject(context.run, name, seed, "pretrain", kind="pretraining")
    described = {
        "model": context.profile.model_settings(name).model_dump(),
        "method": entry.method,
        "training": settings.model_dump(),
        "seed": seed,
    }
    params_hash = digest(described)[:16]
    tags = {"method": entry.method, "params_hash": params_hash}
    with context.track(subject, described, tags, out.metrics, data) as tracker:
        job = Job(f"pretraining/{name}/seed{seed}", entry.method, settings, seed, Path(), context.profile.runtime.checkpoint_minutes)
        made_by = _made_by(context, params_hash, STAGES["pretrain"].digest(context.profile, name))
        state = _train(context, job, data, context.profile.model_settings(name), None, made_by, out, tracker, threads)
    shutil.rmtree(state, ignore_errors=True)


def finetune(context: Context, experiment: str, seed: int, data_path: Path, initial: Path, out: Outputs, threads: int | None) -> None:
    """Train an experiment from its pretraining's checkpoint."""
    entry, settings = context.profile.experiments[experiment], context.profile.training_settings(experiment)
    data = prepared.load(data_path)
    with context.track_result(experiment, seed, "finetune", data, out.metrics) as tracker:
        job = Job(f"{experiment}/seed{seed}", entry.method, settings, seed, Path(), context.profile.runtime.checkpoint_minutes)
        network = context.profile.model_settings(entry.pretraining)
        made_by = _made_by(context, context.profile.params_hash(experiment, seed), STAGES["finetune"].digest(context.profile, experiment))
        state = _train(context, job, data, network, initial, made_by, out, tracker, threads)
    shutil.rmtree(state, ignore_errors=True)


def _made_by(context: Context, params_hash: str, code: str) -> dict[str, str]:
    return {"run": context.run, "params_hash": params_hash, "code": code, "git_commit": git_commit()}


def _train(
    context: Context,
    job: Job,
    data: Prepared,
    model_settings: ModelSettings,
    initial: Path | None,
    made_by: Mapping[str, str],
    out: Outputs,
    tracker: Tracker,
    threads: int | None,
) -> Path:
    """Returns the folder of the resumable state, to be deleted when every declared output is written, the journal too.

    State made by other code, from other settings or inputs, or on another machine, is not continued.
    """
    device = context.device(threads)
    settings = job.settings
    model = wrn.build(model_settings, data.image_shape[0], len(data.classes), job.seed)
    if initial is not None:
        shape, classes = data.image_shape, data.classes
        start = checkpoint.load(initial, data_hash=data.data_hash, model=model_settings, image_shape=shape, classes=classes)
        model.load_state_dict(start.weights)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    machine = [str(device), torch.get_num_threads(), torch.__version__]
    inputs = [data.data_hash, *([initial] if initial else []), made_by["code"]]
    made_from = digest(job.method, settings.model_dump(), model_settings.model_dump(), job.seed, machine, *inputs)
    state = Path("state") / context.run / job.title / made_from[:16]
    job = replace(job, state=state)
    train_data, validation = DeviceData(data, "train", device), DeviceData(data, "validation", device)
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        tracker.tag(f"event_{len(events)}", str(event))

    with alone(state.parent):
        try:
            result = train(
                model,
                job,
                train_data,
                validation,
                torch.from_numpy(data.class_mean),
                lambda row: tracker.metrics(row, int(row["epoch"])),
                on_event,
                lambda epoch, images: tracker.picture("replay_buffer", _png(images), epoch),
            )
        except TrainingError:
            tracker.final(_divergences(events))
            raise
        _write(job, model_settings, data, result, made_by, f"{'finetune' if initial else 'pretrain'}_seconds", out, tracker)
    return state.parent


def _png(images: Tensor, per_row: int = 8) -> bytes:
    """Images, uint8 (N, C, H, W), in rows; small ones enlarged."""
    scale = max(1, 32 // images.shape[-1])
    images = F.pad(images, (1, 1, 1, 1), value=255)
    images = images[: len(images) // per_row * per_row] if len(images) >= per_row else images
    rows = [torch.cat(list(row), dim=2) for row in images.split(per_row)]
    grid = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()  # (H, W, C)
    picture = Image.fromarray(grid if grid.shape[2] == 3 else grid[..., 0])
    file = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _divergences(events: Sequence[Event]) -> dict[str, float]:
    """How often training was brought back, and the epoch in which it first diverged, if it did."""
    found: dict[str, float] = {"recoveries": sum(event.healed for event in events)}
    return found | ({"collapse_epoch": events[0].epoch} if events else {})


def _write(
    job: Job,
    model_settings: ModelSettings,
    data: Prepared,
    result: Trained,
    made_by: Mapping[str, str],
    seconds: str,
    out: Outputs,
    tracker: Tracker,
) -> None:
    """made_by: run, params_hash, code and git_commit. seconds: the name of the training's time."""
    selected = result.selected
    metrics: dict[str, float] = {
        seconds: round(result.seconds, 3),
        "selected_epoch": selected.epoch,
        "selection_score": selected.score,
        "epochs": len(result.rows),
        "n_validation": len(data.validation),
        "n_train": len(data.train),
        **_divergences(result.events),
    }
    header = Header(
        title=job.title,
        method=job.method,
        seed=job.seed,
        model=model_settings,
        training=job.settings,
        image_shape=data.image_shape,
        classes=data.classes,
        data_hash=data.data_hash,
        run=made_by["run"],
        params_hash=made_by["params_hash"],
        git_commit=made_by["git_commit"],
        code=made_by["code"],
        metrics=metrics,
        events=tuple(map(str, result.events)),
    )
    checkpoint.save(Checkpoint(header, selected.weights, selected.buffer, selected.buffer_labels, selected.ema), out.checkpoint)
    columns = list(dict.fromkeys(name for row in result.rows for name in row)) or ["epoch"]
    lines = [",".join(columns), *(",".join(f"{row[c]:.6g}" if c in row else "" for c in columns) for row in result.rows)]
    write_text(out.curve, "\n".join(lines) + "\n")
    told = {"collapse_epoch": None, **metrics, "events": header.events, "method": job.method}
    write_result(out.metrics, {**told, "data_hash": data.data_hash, "git_commit": header.git_commit}, [out.curve])
    tracker.final(metrics)
    tracker.artifact(out.curve)
    tracker.model(out.checkpoint)
