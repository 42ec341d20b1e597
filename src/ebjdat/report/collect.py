"""Result files -> one RunResult per experiment and seed. Every file is checked as it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, Field, ValidationError

from ebjdat import jobs
from ebjdat.errors import brief
from ebjdat.files import FILES, read_result, reading
from ebjdat.layout import place, pretraining_place
from ebjdat.metrics import NEEDED, VOCABULARY
from ebjdat.settings import Profile

OF_THE_FILE = ("method", "data_hash", "git_commit", FILES)  # names in a stage's file that are not results of the run
MANY = 10_000  # names in a result file; real ones have hundreds


class CheckRow(BaseModel, strict=True):
    """An integrity check in attack.json."""

    name: str
    protocol: str | None
    passed: bool | None
    value: float | None
    limit: float | None
    says: str


class Nested(BaseModel, strict=True):
    """Values in result files that are neither a number nor a text."""

    checks: list[CheckRow] | None = None
    sweep: Annotated[list[Annotated[list[float], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None
    events: list[str] | None = None
    ood_missing: dict[str, str] | None = None


class Card(BaseModel, strict=True):
    """What tables and pages read from the data card."""

    name: str
    data_hash: str
    image_shape: list[int]
    classes: Annotated[list[str], Field(min_length=1)]
    sizes: dict[str, int]


@dataclass(frozen=True)
class RunResult:
    """One experiment and seed. metrics: everything its stages measured, by name."""

    experiment: str
    method: str
    seed: int
    params_hash: str
    data_hash: str
    git_commit: str
    metrics: dict[str, Any]


def collect(profile: Profile, results: Path, data_hash: str) -> list[RunResult]:
    """Every experiment and seed, from `results/<experiment>/seed<k>/<stage>.json`. Raises FileError.

    train_seconds is the experiment's fine-tuning plus its (shared) pretraining.
    """
    protocols = profile.evaluation.attack.protocols.keys() | profile.evaluation.generate.protocols.keys()
    runs = []
    for name, experiment in profile.experiments.items():
        for seed in profile.seeds:
            parts = {
                stage: stage_result(results / place(name, seed) / f"{stage}.json", stage, protocols)
                for stage in jobs.measured(profile, name)
            }
            before = stage_result(results / pretraining_place(experiment.pretraining, seed) / "pretrain.json", "pretrain", protocols)
            metrics: dict[str, Any] = {"collapse_epoch": None}
            for part in parts.values():
                metrics |= {name: value for name, value in part.items() if name not in OF_THE_FILE}
            metrics["pretrain_seconds"] = before["pretrain_seconds"]
            metrics["train_seconds"] = round(metrics["finetune_seconds"] + metrics["pretrain_seconds"], 3)
            events = [f"pretraining {experiment.pretraining}, {event}" for event in before.get("events") or []]
            metrics["events"] = events + (metrics.get("events") or [])
            commit = parts["finetune"]["git_commit"]
            runs.append(RunResult(name, experiment.method, seed, profile.params_hash(name, seed), data_hash, commit, metrics))
    return runs


def metrics_of(runs: Sequence[RunResult], experiment: str) -> list[dict[str, Any]]:
    """An experiment's metrics, a dictionary per seed."""
    return [run.metrics for run in runs if run.experiment == experiment]


def checks_of(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Every integrity check of every experiment and seed, with `experiment` and `seed`."""
    return [{"experiment": run.experiment, "seed": run.seed, **check} for run in runs for check in run.metrics.get("checks", [])]


def read_card(path: Path) -> dict[str, Any]:
    """The data card. Raises FileError."""
    card = read_result(path)
    with reading(path):
        _validate(Card, card)
    return card


def stage_result(path: Path, stage: str, protocols: Collection[str]) -> dict[str, Any]:
    """A stage's result file. Raises FileError where it is damaged, lacks what is needed, or a value is not what its name says."""
    result = read_result(path)
    with reading(path):
        if len(result) > MANY:
            raise ValueError(f"{len(result):,} names")
        if FILES not in result:
            raise ValueError(f"without {FILES}, so from an earlier version")
        needed = NEEDED[stage]
        missing = [metric.name for metric in needed if metric.name not in result or (result[metric.name] is None and not metric.nullable)]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
        known = frozenset(protocols)
        for name, value in result.items():
            metric = VOCABULARY.find(name, known)
            if metric is not None and value is not None and not _is_a(value, metric.kind):
                raise ValueError(f"{name} is {brief(repr(value), 60)}, where its unit is {metric.unit}")
        _validate(Nested, result)
    return result


def read_curve(path: Path) -> pd.DataFrame:
    """A training's curve: numbers, a row per epoch. Raises FileError."""
    with reading(path):
        frame = pd.read_csv(path)
        wrong = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
        if wrong:
            raise ValueError(f"{', '.join(map(str, wrong))} should be numbers")
        if "epoch" not in frame:
            raise ValueError("without epoch")
        return frame


def _validate(model: type[BaseModel], values: Mapping[str, Any]) -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
