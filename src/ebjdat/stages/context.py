"""What every stage needs: settings, device, provenance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ebjdat
from ebjdat.errors import UserError
from ebjdat.files import git_commit, lock
from ebjdat.settings import ParamsError, Profile, load, run_name
from ebjdat.tracking.journal import SUFFIX, Subject
from ebjdat.tracking.tracker import Tracker

if TYPE_CHECKING:  # the report needs no torch, which takes seconds, reads no data, and does not depend on how that is prepared
    import torch

    from ebjdat.data.prepared import Prepared


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
    ) -> Tracker:
        """Track a stage; its journal will lie beside `out`, the stage's result. settings: all that determines it; tags: method, hashes."""
        record = None
        if data is not None:
            splits = {f"n_{name}": len(getattr(data, name)) for name in ("train", "validation", "test")}
            source = Path(self.profile.data.path).name if self.profile.data.path else self.profile.data.name
            record = {"name": self.profile.data.name, "digest": data.data_hash, "source": source, "image_shape": data.image_shape, **splits}
            tags = {**tags, "data_hash": data.data_hash}
        return Tracker(subject, settings, {**tags, "git_commit": git_commit()}, journal_of(out), record, source_files())

    def track_result(self, experiment: str, seed: int, stage: str, data: Prepared, out: Path) -> Tracker:
        """Track a stage of an experiment: its run carries the experiment's resolved settings."""
        entry = self.profile.experiments[experiment]
        protocols = self.profile.evaluation.attack.protocols.items()
        tags = {
            "method": entry.method,
            "base": entry.base or "",
            "form": entry.form or "",
            "params_hash": self.profile.params_hash(experiment, seed),
            "protocol": "; ".join(f"{name}: {p.norm} radius {p.radius:.4g} in [0, 1]" for name, p in protocols),
        }
        settings = {**self.profile.resolved(experiment), "seed": seed}
        return self.track(Subject(self.run, experiment, seed, stage), settings, tags, out, data)


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
                f"{place}: another process is at work on this right now. Wait for it, or stop it (ps aux | grep ebjdat), and rerun."
            ) from None
        yield
