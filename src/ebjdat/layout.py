"""Where a run's files lie, relative to the project's root. Stated here alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """run: the profile's name, with a digest of the overrides if there are any.

    place: below that, where one training's files lie: "eb_jdat/seed0", "pretraining/clean/seed0"; "" for what belongs to the whole run.
    """

    run: str

    @property
    def data(self) -> str:
        return f"data/{self.run}/data.npz"

    @property
    def card(self) -> str:
        return f"data/{self.run}/card.json"

    def checkpoint(self, place: str) -> str:
        return f"checkpoints/{self.run}/{place}.safetensors"

    def result(self, place: str, file: str) -> str:
        return _below(f"results/{self.run}", place, file)

    def log(self, place: str, stage: str) -> str:
        return _below(f"logs/{self.run}", place, f"{stage}.log")

    def benchmark(self, place: str, stage: str) -> str:
        return _below(f"benchmarks/{self.run}", place, f"{stage}.tsv")

    def digest(self, title: str) -> str:
        """What a job depends on beside its input files: code and settings."""
        return f"digests/{self.run}/{title}.json"


def place(experiment: str, seed: int | str) -> str:
    return f"{experiment}/seed{seed}"


def pretraining_place(pretraining: str, seed: int | str) -> str:
    return f"pretraining/{pretraining}/seed{seed}"


def _below(*parts: str) -> str:
    return "/".join(filter(None, parts))
