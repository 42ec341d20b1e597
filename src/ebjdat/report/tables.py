"""Result files -> one row per experiment and seed (summary.csv), one row per experiment (table), with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ebjdat.files import read_json, write_text
from ebjdat.params import Profile, base_of, flat, form_of
from ebjdat.registry import BASES, FORMS, METHODS
from ebjdat.statistics import normal, over_seeds, wilson

# The contract with other programs: columns of summary.csv, in this order. Documented in docs/results-format.md.
SUMMARY_COLUMNS = (
    "experiment",
    "method",
    "seed",
    "n_test",
    "clean_acc",
    "pgd20_acc",
    "n_attack",
    "autoattack_acc",
    "frechet",
    "frechet_extractor",
    "n_samples",
    "energy_gap_adversarial",
    "energy_gap_generated",
    "train_seconds",
    "params_hash",
    "data_hash",
    "git_commit",
    "collapse_epoch",
    "recoveries",
)
STAGES = ("finetune", "attack", "generate", "energy", "reliability")


@dataclass(frozen=True)
class Row:
    """One experiment and seed. metrics: everything its stages measured, by name."""

    experiment: str
    method: str
    seed: int
    params_hash: str
    data_hash: str
    git_commit: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A column of the table. correct: the count it is a fraction of `n` from; se: its standard error, for the interval."""

    name: str
    label: str
    percent: bool
    n: str
    better: str  # "higher" or "lower"
    correct: str | None = None
    se: str | None = None
    paper: str | None = None  # its name among the paper's numbers


METRICS = (
    Metric("clean_acc", "clean %", True, "n_test", "higher", "clean_correct", paper="clean"),
    Metric("pgd20_acc", "PGD-20 %", True, "n_test", "higher", "pgd20_correct", paper="pgd20"),
    Metric("autoattack_acc", "AutoAttack %", True, "n_attack", "higher", "autoattack_correct", paper="autoattack"),
    Metric("frechet", "Fréchet", False, "n_samples", "lower", paper="fid"),
    Metric("energy_gap_adversarial", "gap adv.", False, "n_energy_clean", "lower", se="energy_gap_adversarial_se"),
    Metric("energy_gap_generated", "gap gen.", False, "n_energy_generated", "lower", se="energy_gap_generated_se"),
    Metric("train_seconds", "train s", False, "", "lower"),
)


def collect(profile: Profile, results: Path, data_hash: str) -> list[Row]:
    """Rows of all experiments and seeds, from `results/<experiment>/seed<k>/<stage>.json`.

    train_seconds is the experiment's fine-tuning plus its (shared) pretraining.
    """
    rows = []
    for name, experiment in profile.experiments.items():
        for seed in profile.seeds:
            folder = results / name / f"seed{seed}"
            parts = {stage: read_json(folder / f"{stage}.json") for stage in STAGES}
            before = read_json(results / "pretraining" / experiment.pretraining / f"seed{seed}" / "pretrain.json")
            metrics: dict[str, Any] = {}
            for part in parts.values():
                metrics |= {k: v for k, v in part.items() if k not in ("method", "data_hash", "git_commit")}
            metrics["finetune_seconds"] = metrics["train_seconds"]
            metrics["train_seconds"] = round(metrics["train_seconds"] + before["train_seconds"], 3)
            events = [f"pretraining {experiment.pretraining}, {event}" for event in before.get("events", [])]
            metrics["events"] = events + metrics.get("events", [])
            commit = parts["finetune"]["git_commit"]
            rows.append(Row(name, experiment.method, seed, profile.params_hash(name, seed), data_hash, commit, metrics))
    return rows


def write_summary(rows: Sequence[Row], path: Path) -> None:
    """summary.csv: accuracies as fractions; a value that was not measured is empty."""
    frame = pd.DataFrame([{**row.metrics, **vars(row)} for row in rows]).reindex(columns=list(SUMMARY_COLUMNS))
    write_text(path, frame.to_csv(index=False))


def interval_of(metric: Metric, metrics: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """95 % interval: over seeds when there are several; else Wilson over examples, or normal from a standard error."""
    values = [m[metric.name] for m in metrics]
    if len(values) > 1:
        return over_seeds(values)
    if metric.correct and metrics[0].get(metric.correct) is not None:
        return wilson(metrics[0][metric.correct], metrics[0][metric.n])
    if metric.se:
        low, high = normal(values[0], metrics[0][metric.se])
        return max(0.0, low), high  # a gap is not negative
    return None


def aggregate(profile: Profile, rows: Sequence[Row]) -> pd.DataFrame:
    """One row per experiment: mean over seeds, 95 % interval, standard deviation over seeds, n, and the paper's number."""
    is_fid = {row.metrics["frechet_extractor"] for row in rows} == {"inception"}  # else the paper's FID is another quantity
    records = []
    for name, experiment in profile.experiments.items():
        mine = [row.metrics for row in rows if row.experiment == name]
        record: dict[str, Any] = {"experiment": name, "method": experiment.method, "seeds": len(mine)}
        paper = paper_numbers(profile, name)
        for metric in METRICS:
            values = [m[metric.name] for m in mine if m.get(metric.name) is not None]
            if len(values) < len(mine):
                continue
            record[metric.name] = float(np.mean(values))
            interval = interval_of(metric, mine)
            if interval:
                record[f"{metric.name}_low"], record[f"{metric.name}_high"] = interval
            if len(mine) > 1:
                record[f"{metric.name}_sd"] = float(np.std(values, ddof=1))
            if metric.n:
                record[f"{metric.name}_n"] = int(mine[0][metric.n])
            theirs = paper.get(metric.paper or "")
            if theirs is not None and (metric.name != "frechet" or is_fid):
                record[f"{metric.name}_paper"] = theirs / 100 if metric.percent else theirs
        record["frechet_extractor"] = mine[0]["frechet_extractor"]
        collapses = [m["collapse_epoch"] for m in mine if m.get("collapse_epoch") is not None]
        record["collapses"] = len(collapses)
        record["collapse_epochs"] = " ".join(str(epoch) for epoch in collapses)
        record["recoveries"] = sum(m.get("recoveries", 0) for m in mine)
        records.append(record)
    return pd.DataFrame(records)


def collapse_cell(record: pd.Series) -> str:
    """In how many of the seeds training diverged, in which epochs first, and how often it was brought back."""
    if not record["collapses"]:
        return "–"
    text = f"{record['collapses']} of {record['seeds']}: epoch {record['collapse_epochs'].replace(' ', ', ')}"
    return f"{text}; {record['recoveries']} healed" if record["recoveries"] else f"{text}; recorded"


def differences(profile: Profile, experiment: str) -> str:
    """What an experiment is, beside its method's source: its base, its form, and its own settings."""
    entry = profile.experiments[experiment]
    method, row = METHODS[entry.method], base_of(entry.method, entry.base)
    parts = [f"on {BASES[row].source}"] if row and len(method.bases) > 1 else []
    form = form_of(entry.method, entry.form)
    parts += [f"{form} form"] if form else []
    parts += [f"{name} = {value}" for name, value in flat(entry.training).items()]
    return ", ".join(parts)


def paper_numbers(profile: Profile, experiment: str) -> dict[str, float]:
    """The paper's numbers for an experiment, when the profile's data set is the paper's; nothing where it reports none.

    EB-JDAT's are by base, and for its ablation by (w1, w2, w3). Its main numbers stand beside both forms, since the paper
    defines one and its code computes the other; not beside variants that neither has.
    """
    if profile.report.paper is None:
        return {}
    everything = yaml.safe_load(resources.files("ebjdat.report").joinpath("paper.yaml").read_text(encoding="utf-8"))
    entry, settings = profile.experiments[experiment], profile.training_settings(experiment)
    rows: dict[str, dict[str, float]] = {row["method"]: row for row in everything[profile.report.paper]["rows"]}
    name = form_of(entry.method, entry.form)
    if name is None:
        return rows.get(entry.method, {})
    form = FORMS[name].defaults
    if settings.adversary.score != form["adversary"]["score"]:
        return {}
    base, weights = base_of(entry.method, entry.base), [settings.weights.w1, settings.weights.w2, settings.weights.w3]
    if weights == [1.0, form.get("weights", {}).get("w2", 1.0), 1.0]:
        return rows.get(f"{entry.method}_{base}", {})
    ablation = everything[profile.report.paper].get(f"ablation_{base}", [])
    return next((row for row in ablation if row["w"] == weights), {})


def cell_parts(record: pd.Series, metric: Metric) -> list[str]:
    """A value, its spread (several seeds: +- sd; one: its interval) and the paper's number, each where there is one."""
    value = record.get(metric.name)
    if value is None or pd.isna(value):
        return ["–"]
    scale, digits = (100, 1) if metric.percent else (1, 2 if abs(value) < 100 else 0)
    parts = [f"{value * scale:.{digits}f}"]
    sd, low, high, paper = (record.get(f"{metric.name}_{part}") for part in ("sd", "low", "high", "paper"))
    if sd is not None and not pd.isna(sd):
        parts.append(f"± {sd * scale:.{digits}f}")
    elif low is not None and not pd.isna(low):
        parts.append(f"[{low * scale:.{digits}f}, {high * scale:.{digits}f}]")
    if paper is not None and not pd.isna(paper):
        parts.append(f"(paper {paper * scale:.{digits}f})")
    return parts


def cell(record: pd.Series, metric: Metric) -> str:
    return " ".join(cell_parts(record, metric))


def header_parts(metric: Metric, table: pd.DataFrame) -> list[str]:
    """Column title (for the Fréchet distance with its extractor), and n."""
    label = metric.label
    if metric.name == "frechet":
        names = sorted(set(table["frechet_extractor"]))
        label = "FID" if names == ["inception"] else f"Fréchet ({', '.join(names)})"
    n = f"{metric.name}_n"
    if n in table and table[n].notna().any():
        return [label, f"n={'/'.join(map(str, sorted({int(v) for v in table[n].dropna()})))}"]
    return [label]


def header(metric: Metric, table: pd.DataFrame) -> str:
    return ", ".join(header_parts(metric, table))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    write_text(path, table.to_csv(index=False, float_format="%.6g"))


def write_markdown(table: pd.DataFrame, rows: Sequence[Row], profile: Profile, card: dict[str, Any], path: Path) -> None:
    heads = ["experiment", *(header(m, table) for m in METRICS), "diverged"]
    lines = markdown_table(
        [heads, *([record["experiment"], *(cell(record, m) for m in METRICS), collapse_cell(record)] for _, record in table.iterrows())]
    )
    text = [*lines, "", protocol(profile, card), ""]
    averaged = averaged_weights(rows)
    if averaged:
        text += ["Averaged weights (EMA) beside the raw ones:", "", *markdown_table(averaged), ""]
    write_text(path, "\n".join(text))


def averaged_weights(rows: Sequence[Row]) -> list[list[str]]:
    """Header and a row per run whose training kept averaged weights: raw -> averaged."""
    pairs = (("clean_acc", "clean %"), ("pgd20_acc", "PGD-20 %"), ("autoattack_acc", "AutoAttack %"), ("frechet", "Fréchet"))
    found = []
    for row in rows:
        if "ema_clean_acc" in row.metrics:
            cells = []
            for name, _ in pairs:
                raw, averaged = row.metrics.get(name), row.metrics.get(f"ema_{name}")
                scale, digits = (1, 2) if name == "frechet" else (100, 1)
                cells.append("–" if raw is None or averaged is None else f"{raw * scale:.{digits}f} → {averaged * scale:.{digits}f}")
            found.append([row.experiment, str(row.seed), *cells])
    return [["experiment", "seed", *(label for _, label in pairs)], *found] if found else []


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def protocol(profile: Profile, card: dict[str, Any]) -> str:
    """What the numbers mean, in a paragraph."""
    attack, generate = profile.evaluation.attack, profile.evaluation.generate
    spread = "± standard deviation over seeds" if len(profile.seeds) > 1 else "brackets: 95 % intervals (accuracies: Wilson)"
    aa = f"AutoAttack standard on the first {attack.autoattack.n} of them" if attack.autoattack.n else "AutoAttack not run"
    return (
        f"Data {card['name']} ({card['data_hash']}), test split, {len(profile.seeds)} seed(s), {spread}. "
        f"{attack.norm} eps = {attack.eps:.4g} in [0, 1] pixels, no noise, eval mode; PGD-20 with step {attack.pgd20_step:.4g} on all "
        f"test examples, {aa}. Fréchet distance of {generate.n} fresh chains, none discarded, to the training split; it is "
        "called FID only with Inception's features, and is biased in n. Gaps: mean |E(x) - E(adversarial)| over pairs; "
        "|mean E(x) - mean E(generated)|."
    )
