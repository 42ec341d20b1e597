"""What every stage needs: settings, device, provenance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebjdat import params
from ebjdat.files import git_commit
from ebjdat.params import Profile
from ebjdat.tracking.runs import Subject, Tracker, track


@dataclass(frozen=True)
class Context:
    profile: Profile
    run: str  # name of results, checkpoints and MLflow experiment

    @classmethod
    def load(cls, path: Path, overrides: list[str]) -> Context:
        return cls(params.load(path, overrides), params.run_name(path, overrides))

    def device(self, threads: int | None = None) -> torch.device:
        """The device of the settings, with exactly the threads that were asked for, and deterministic algorithms."""
        torch.set_num_threads(threads or self.profile.runtime.threads)
        wanted = self.profile.runtime.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and not torch.cuda.is_available():
            raise params.ParamsError("runtime.device is 'cuda', but torch finds no GPU; allowed here: cpu, auto")
        if wanted == "cuda":  # what runs here is deterministic on a CPU as it is
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        return torch.device(wanted)

    def track(self, subject: Subject, settings: Mapping[str, Any], hashes: Mapping[str, str]) -> AbstractContextManager[Tracker]:
        return track(subject, settings, {"git_commit": git_commit(), **hashes})

    def track_result(self, experiment: str, seed: int, stage: str | None, data_hash: str) -> AbstractContextManager[Tracker]:
        """Track a stage of an experiment (None: the experiment as a whole): its run carries the experiment's resolved settings."""
        entry = self.profile.experiments[experiment]
        return self.track(
            Subject(self.run, experiment, seed, stage),
            {**self.profile.resolved(experiment), "seed": seed},
            {
                "method": entry.method,
                "base": params.base_of(entry.method, entry.base) or "",
                "form": params.form_of(entry.method, entry.form) or "",
                "params_hash": self.profile.params_hash(experiment, seed),
                "data_hash": data_hash,
            },
        )
