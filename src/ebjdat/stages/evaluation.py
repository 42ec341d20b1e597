"""What the evaluations of a checkpoint share: `attack`, `generate`, `energy` and `reliability`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ebjdat.data import prepared
from ebjdat.data.prepared import Prepared
from ebjdat.files import digest, git_commit, write_result
from ebjdat.jobs import STAGES
from ebjdat.stages.context import Context, alone
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint

PICTURES = (".png", ".gif")


@dataclass(frozen=True)
class Task:
    """A stage's job on an experiment: the files that it reads and writes, by their names on the command line.

    inputs: "data", "weights", and more by stage. outputs: "out" (JSON), and more by stage. threads: None for the profile's.
    """

    experiment: str
    seed: int
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    threads: int | None = None


@dataclass
class Evaluation:
    """An evaluation at work. metrics and provenance are filled by the stage: they become its result.

    state: folder of an evaluation that can be resumed, which depends on all that its partial results depend on.
    """

    title: str
    data: Prepared
    device: torch.device
    checkpoint: Checkpoint
    state: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def open_evaluation(context: Context, task: Task, stage: str, resumable: bool = False) -> Iterator[Evaluation]:
    """Load what an evaluation of a checkpoint needs, track it, and write its result at the end.

    resumable: one process at a time, whose `state` is deleted after every declared output is written, the journal too. Raises
    CheckpointError for a checkpoint of another method, network or data; BusyError while another process does the same.
    """
    data = prepared.load(task.inputs["data"])
    device = context.device(task.threads)
    loaded = checkpoint.load_for(context.profile, task.experiment, task.inputs["weights"], data)
    folder = Path("state") / context.run / task.experiment / f"seed{task.seed}-{stage}"
    state = folder
    if resumable:
        settings, code = STAGES[stage].reads(context.profile, task.experiment), STAGES[stage].digest(context.profile, task.experiment)
        state = folder / state_key(settings, device, code, data.data_hash, task.inputs["weights"])
    evaluation = Evaluation(f"{task.experiment}/seed{task.seed}", data, device, loaded, state)
    out, files = task.outputs["out"], [path for name, path in task.outputs.items() if name != "out"]
    with (
        context.track_result(task.experiment, task.seed, stage, data, out) as tracker,
        alone(folder) if resumable else contextlib.nullcontext(),
    ):
        yield evaluation
        write_result(out, {**evaluation.metrics, **evaluation.provenance, "git_commit": git_commit()}, files)
        tracker.final(evaluation.metrics)
        for path in files:
            if path.suffix in PICTURES:
                tracker.artifact(path)
    if resumable:
        shutil.rmtree(folder, ignore_errors=True)


def state_key(settings: Mapping[str, Any], device: torch.device, code: str, *inputs: Any) -> str:
    """Digest of all that partial results depend on: where any of it differs, an evaluation starts again."""
    machine = [str(device), torch.get_num_threads(), torch.__version__]
    return digest(settings, machine, code, *inputs)[:16]
