"""What every stage needs: settings, device, provenance."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ebjdat
from ebjdat.errors import UserError
from ebjdat.files import digest, git_commit, lock, write_result
from ebjdat.jobs import STAGES
from ebjdat.settings import ParamsError, Profile, base_of, form_of, load, run_name
from ebjdat.tracking.journal import SUFFIX
from ebjdat.tracking.tracker import About, Subject, Tracker, track

if TYPE_CHECKING:  # the report needs no torch, which takes seconds, reads no data, and does not depend on how that is prepared
    import torch

    from ebjdat.data.prepared import Prepared
    from ebjdat.training.checkpoint import Checkpoint

PICTURES = (".png", ".gif")


class BusyError(UserError):
    """Another process does this job."""


@dataclass(frozen=True)
class Context:
    profile: Profile
    run: str  # name of results, checkpoints and MLflow experiment
    overrides: tuple[str, ...] = ()  # as they were given; the report shows them in its commands

    @classmethod
    def load(cls, path: Path, overrides: list[str]) -> Context:
        return cls(load(path, overrides), run_name(path, overrides), tuple(overrides))

    def device(self, threads: int | None = None) -> torch.device:
        """The device of the settings, with exactly the threads that were asked for, and deterministic algorithms."""
        return device_for(self.profile.runtime.device, threads or self.profile.runtime.threads)

    def track(
        self, subject: Subject, settings: Mapping[str, Any], tags: Mapping[str, str], out: Path, data: Prepared | None = None
    ) -> AbstractContextManager[Tracker]:
        """Track a stage; its journal will lie beside `out`, the stage's result. settings: all that determines it; tags: method, hashes."""
        told = None
        if data is not None:
            splits = {f"n_{name}": len(getattr(data, name)) for name in ("train", "validation", "test")}
            source = Path(self.profile.data.path).name if self.profile.data.path else self.profile.data.name
            told = {"name": self.profile.data.name, "digest": data.data_hash, "source": source, "image_shape": data.image_shape, **splits}
            tags = {**tags, "data_hash": data.data_hash}
        about = About(settings, {**tags, "git_commit": git_commit()}, told, source_files())
        return track(subject, about, journal_of(out))

    def track_result(self, experiment: str, seed: int, stage: str, data: Prepared, out: Path) -> AbstractContextManager[Tracker]:
        """Track a stage of an experiment: its run carries the experiment's resolved settings."""
        entry = self.profile.experiments[experiment]
        protocols = self.profile.evaluation.attack.protocols.items()
        tags = {
            "method": entry.method,
            "base": base_of(entry.method, entry.base) or "",
            "form": form_of(entry.method, entry.form) or "",
            "params_hash": self.profile.params_hash(experiment, seed),
            "protocol": "; ".join(f"{name}: {p.norm} radius {p.radius:.4g} in [0, 1]" for name, p in protocols),
        }
        settings = {**self.profile.resolved(experiment), "seed": seed}
        return self.track(Subject(self.run, experiment, seed, stage), settings, tags, out, data)


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
    from ebjdat.data import prepared
    from ebjdat.training import checkpoint

    data = prepared.load(task.inputs["data"])
    device = context.device(task.threads)
    loaded = checkpoint.load_for(context.profile, task.experiment, task.inputs["weights"], data)
    folder = Path("state") / context.run / task.experiment / f"seed{task.seed}-{stage}"
    settings = STAGES[stage].reads(context.profile, task.experiment)
    key = state_key(settings, device, STAGES[stage].digest(context.profile, task.experiment), data.data_hash, task.inputs["weights"])
    evaluation = Evaluation(f"{task.experiment}/seed{task.seed}", data, device, loaded, folder / key)
    out, *files = task.outputs.values()
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
    import torch

    machine = [str(device), torch.get_num_threads(), torch.__version__]
    return digest(settings, machine, code, *inputs)[:16]


def journal_of(out: Path) -> Path:
    """Where the finished journal of the stage that writes `out` lies: finetune.journal.jsonl beside finetune.json."""
    return out.with_name(out.stem + SUFFIX)


def device_for(wanted: str, threads: int) -> torch.device:
    """ "cpu", "cuda" or "auto" as a device, with exactly these threads, fp32 that means fp32, and deterministic algorithms."""
    import torch

    torch.set_num_threads(threads)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ParamsError("runtime.device is 'cuda', but torch finds no GPU; allowed here: cpu, auto")
    if wanted == "cuda":  # what runs here is deterministic on a CPU as it is
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(wanted)


def source_files() -> list[Path]:
    """This package's modules."""
    return sorted(Path(ebjdat.__file__).parent.rglob("*.py"))


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Refuse to do what another process does, e.g. one that outlived its killed workflow: both write the same files."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(place / "lock", wait=False))
        except BlockingIOError:
            raise BusyError(
                f"{place}: another process is at work on this right now. Wait for it, or stop it (ps aux | grep ebjdat), and run again."
            ) from None
        yield
