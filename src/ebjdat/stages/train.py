"""Stages `pretrain` and `finetune`: data (and a checkpoint) -> checkpoint, metrics, curves."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ebjdat.data import prepared
from ebjdat.data.prepared import Prepared
from ebjdat.files import digest, git_commit, write_result, write_text
from ebjdat.jobs import STAGES
from ebjdat.settings import ModelSettings, TrainingSettings
from ebjdat.stages.context import Context, alone
from ebjdat.tracking.journal import Subject
from ebjdat.tracking.tracker import Tracker
from ebjdat.training import checkpoint
from ebjdat.training.fit import Provenance, divergences, fit, to_checkpoint
from ebjdat.training.healing import Event
from ebjdat.training.loop import Hooks
from ebjdat.training.state import Job, TrainingError


@dataclass(frozen=True)
class Outputs:
    checkpoint: Path
    metrics: Path
    curve: Path


def pretrain(context: Context, name: str, seed: int, data_path: Path, out: Outputs, threads: int | None) -> None:
    """Train (or, for 0 epochs, only initialise) the checkpoint that several experiments start from."""
    entry, settings = context.profile.pretraining[name], context.profile.pretraining_settings(name)
    model, data = context.profile.model_settings(name), prepared.load(data_path)
    described = {"model": model.model_dump(), "method": entry.method, "training": settings.model_dump(), "seed": seed}
    params_hash = digest(described)[:16]
    subject = Subject(context.run, name, seed, "pretrain", kind="pretraining")
    tags = {"method": entry.method, "params_hash": params_hash}
    job = _job(context, f"pretraining/{name}/seed{seed}", entry.method, settings, seed)
    made_by = Provenance(context.run, params_hash, git_commit(), STAGES["pretrain"].digest(context.profile, name))
    with context.track(subject, described, tags, out.metrics, data) as tracker:
        _train(job, model, data, context.device(threads), {}, made_by, out, tracker)
    shutil.rmtree(job.state, ignore_errors=True)  # every declared output is written, the journal too


def finetune(
    context: Context,
    experiment: str,
    seed: int,
    data_path: Path,
    initial: Path,
    out: Outputs,
    threads: int | None,
    teacher: Path | None = None,
) -> None:
    """Train an experiment from its pretraining's checkpoint. teacher: weights of the network that its settings name as teacher."""
    entry, settings = context.profile.experiments[experiment], context.profile.training_settings(experiment)
    model, data = context.profile.model_settings(entry.pretraining), prepared.load(data_path)
    job = _job(context, f"{experiment}/seed{seed}", entry.method, settings, seed)
    params_hash = context.profile.params_hash(experiment, seed)
    made_by = Provenance(context.run, params_hash, git_commit(), STAGES["finetune"].digest(context.profile, experiment))
    with context.track_result(experiment, seed, "finetune", data, out.metrics) as tracker:
        _train(job, model, data, context.device(threads), {"initial": initial, "teacher": teacher}, made_by, out, tracker)
    shutil.rmtree(job.state, ignore_errors=True)


def _job(context: Context, title: str, method: str, settings: TrainingSettings, seed: int) -> Job:
    return Job(title, method, settings, seed, Path("state") / context.run / title, context.profile.runtime.checkpoint_minutes)


def _train(
    job: Job,
    model: ModelSettings,
    data: Prepared,
    device: torch.device,
    weights: Mapping[str, Path | None],
    made_by: Provenance,
    out: Outputs,
    tracker: Tracker,
) -> None:
    """Train, then write and track the outputs. weights: files that `fit` reads, "initial" and "teacher"."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        tracker.tag(f"event_{len(events)}", str(event))

    hooks = Hooks(
        lambda row: tracker.metrics(row, int(row["epoch"])),
        on_event,
        lambda epoch, images: tracker.picture("replay_buffer", _png(images), epoch),
    )
    with alone(job.state):
        try:
            state = fit(job, model, data, device, code=made_by.code, hooks=hooks, **weights)
        except TrainingError:
            tracker.final(divergences(events))
            raise
        made = to_checkpoint(job, model, data, state, "finetune_seconds" if weights else "pretrain_seconds", made_by)
        checkpoint.save(made, out.checkpoint)
        write_text(out.curve, _curve(state.rows))
        header = made.header
        result = {"collapse_epoch": None, **header.metrics, "events": header.events, "method": job.method}
        write_result(out.metrics, {**result, "data_hash": data.data_hash, "git_commit": header.git_commit}, [out.curve])
        tracker.final(header.metrics)
        tracker.artifact(out.curve)
        tracker.model(out.checkpoint)


def _curve(rows: Sequence[Mapping[str, float]]) -> str:
    """CSV, a line per epoch; what an epoch did not measure is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["epoch"]
    lines = [",".join(columns), *(",".join(f"{row[c]:.6g}" if c in row else "" for c in columns) for row in rows)]
    return "\n".join(lines) + "\n"


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
