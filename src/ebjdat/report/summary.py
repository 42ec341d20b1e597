"""Results over seeds: means with intervals, summary.csv, metrics.json and table.csv, and the paper's numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ebjdat.errors import printable
from ebjdat.files import write_text
from ebjdat.intervals import normal, over_seeds, wilson
from ebjdat.metrics import HEADLINE, SUMMARY, TABLE, describe
from ebjdat.names import STANDARD, flat_name, take_apart
from ebjdat.report.collect import RunResult, metrics_of
from ebjdat.settings import Profile, form_values


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval, nan where there is none. n: examples or samples of a seed, 0 if not counted."""

    value: float
    low: float
    high: float
    n: int
    seeds: int

    def percent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def estimate(seeds: Sequence[dict[str, Any]], name: str, protocol: str = STANDARD) -> Estimate | None:
    """A metric over the seeds that measured it; None where none did. seeds: metrics of each; name: without its protocol.

    The interval is over seeds where there are several; else over examples: Wilson's of a count, or normal from a standard error.
    """
    metric, column = describe(name), flat_name(name, protocol=protocol)
    measured = [seed for seed in seeds if seed.get(column) is not None]
    if not measured:
        return None
    values, first = [seed[column] for seed in measured], measured[0]
    n = int(first.get(flat_name(metric.n, protocol=protocol)) or 0)
    low, high = math.nan, math.nan
    if len(values) > 1:
        low, high = over_seeds(values)
    elif metric.interval == "wilson":
        parts = take_apart(name)
        correct = first.get(flat_name(parts.statistic.removesuffix("acc") + "correct", parts.attack, protocol))
        low, high = (low, high) if correct is None else wilson(correct, n)
    elif metric.interval in ("normal", "signed"):
        error = first.get(f"{column}_se")
        low, high = (low, high) if error is None else normal(values[0], error)
        low = max(0.0, low) if metric.interval == "normal" and not math.isnan(low) else low
    return Estimate(float(np.mean(values)), low, high, n, len(values))


def spreadsheet(frame: pd.DataFrame, **options: Any) -> str:
    """A table as CSV. An apostrophe precedes text that a spreadsheet would compute (it begins with = + - @); numbers stay."""

    def safe(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return f"'{printable(value)}" if value.lstrip().startswith(tuple("=+-@＝＋－＠")) else printable(value)

    return frame.map(safe).to_csv(index=False, **options)


def write_summary(runs: Sequence[RunResult], path: Path) -> None:
    """summary.csv: accuracies as fractions; a value that was not measured is empty."""
    frame = pd.DataFrame([{**run.metrics, **vars(run)} for run in runs]).reindex(columns=list(SUMMARY))
    write_text(path, spreadsheet(frame))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    write_text(path, spreadsheet(table, float_format="%.6g"))


def headline(runs: Sequence[RunResult]) -> dict[str, dict[str, float]]:
    """Experiment -> headline metric -> mean over seeds, to six digits; without what was not measured for every seed."""
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.experiment for run in runs):
        seeds = metrics_of(runs, name)
        measured = [metric for metric in HEADLINE if all(seed.get(metric) is not None for seed in seeds)]
        means[name] = {metric: float(f"{np.mean([seed[metric] for seed in seeds]):.6g}") for metric in measured}
    return means


def aggregate(profile: Profile, runs: Sequence[RunResult]) -> pd.DataFrame:
    """One row per experiment: mean over seeds, 95 % interval, standard deviation over seeds, n, and the paper's number."""
    is_fid = {run.metrics["frechet_extractor"] for run in runs} == {"inception"}  # else the paper's FID is another quantity
    records = []
    for name, experiment in profile.experiments.items():
        seeds = metrics_of(runs, name)
        record: dict[str, Any] = {"experiment": name, "method": experiment.method, "seeds": len(seeds)}
        paper = paper_numbers(profile, name)
        for metric in TABLE:
            own, reference = estimate(seeds, metric.name), paper.get(metric.paper)
            if own is None or own.seeds < len(seeds):
                continue
            record[metric.name] = own.value
            if not math.isnan(own.low):
                record[f"{metric.name}_low"], record[f"{metric.name}_high"] = own.low, own.high
            if own.seeds > 1:
                record[f"{metric.name}_sd"] = float(np.std([seed[metric.name] for seed in seeds], ddof=1))
            if metric.n:
                record[f"{metric.name}_n"] = own.n
            if reference is not None and (metric.name != "frechet" or is_fid):
                record[f"{metric.name}_paper"] = reference / 100 if metric.percent else reference
        record["frechet_extractor"] = seeds[0]["frechet_extractor"]
        collapses = [seed["collapse_epoch"] for seed in seeds if seed.get("collapse_epoch") is not None]
        record["collapses"] = len(collapses)
        record["collapse_epochs"] = " ".join(str(epoch) for epoch in collapses)
        record["recoveries"] = sum(seed.get("recoveries") or 0 for seed in seeds)
        records.append(record)
    return pd.DataFrame(records)


def paper_numbers(profile: Profile, experiment: str) -> dict[str, float]:
    """The paper's numbers for an experiment, when the profile's data set is the paper's; nothing where it reports none.

    EB-JDAT's are by base, and for its ablation by (w1, w2, w3). Its main numbers are shown for every form, since the paper
    defines one, its code computes another, and it does not say which of the two made them; not for variants that neither has.
    """
    if profile.report.paper is None:
        return {}
    everything = yaml.safe_load(resources.files("ebjdat.report").joinpath("paper.yaml").read_text(encoding="utf-8"))
    entry, settings = profile.experiments[experiment], profile.training_settings(experiment)
    with_awp = settings.update.name == "awp"
    rows: dict[str, dict[str, float]] = {
        row["method"]: row for row in everything[profile.report.paper]["rows"] if (row.get("update") == "awp") == with_awp
    }
    name = entry.form
    if name is None:
        return rows.get(entry.method, {})
    base = entry.base
    form = form_values(name, base)
    if settings.adversary.score != form["adversary"]["score"]:
        return {}
    weights = [settings.weights.w1, settings.weights.w2, settings.weights.w3]
    if weights == [form.get("weights", {}).get(name, 1.0) for name in ("w1", "w2", "w3")]:
        return rows.get(f"{entry.method}_{base}", {})
    ablation = everything[profile.report.paper].get(f"ablation_{base}", [])
    return next((row for row in ablation if row["w"] == weights), {})
