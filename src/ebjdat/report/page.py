"""The HTML report and its audit page: files with everything inside, which open without network."""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageSequence

from ebjdat.errors import printable
from ebjdat.files import read_json, read_npz, reading, write_text
from ebjdat.registry import METHODS, PROTOCOLS
from ebjdat.report import inline, tables
from ebjdat.report.claims import Finding
from ebjdat.report.tables import METRICS, STAGES, Metric, Row, averaged_weights, cell_parts, collapse_cell, differences, header_parts
from ebjdat.settings import RELEASED, Profile, flat, join_overrides

MOST_PIXELS = 100_000_000  # of a picture, over all its frames; ours have a few millions
TRILEMMA = ("clean_acc", "pgd20_acc", "autoattack_acc", "frechet")
ENERGY_GROUPS = ("clean", "adversarial", "generated")
ENERGY_COLUMNS = {
    "energy_clean": "mean clean",
    "energy_adversarial": "mean adversarial",
    "energy_generated": "mean generated",
    "energy_gap_adversarial": "gap adv. (pairs)",
    "energy_gap_generated": "gap gen.",
    "energy_overlap_adversarial": "overlap adv.",
    "energy_overlap_generated": "overlap gen.",
    "energy_wasserstein_adversarial": "W₁ adv.",
    "energy_wasserstein_generated": "W₁ gen.",
}


def embed(path: Path) -> str:
    """A picture as a data URI: as lossless WebP where that is smaller (enlarged pixels shrink to a tenth), else as it is."""
    with reading(path):
        original, memory = path.read_bytes(), io.BytesIO()
        picture = Image.open(io.BytesIO(original), formats=("PNG", "GIF"))
        pixels = picture.width * picture.height * getattr(picture, "n_frames", 1)
        if pixels > MOST_PIXELS:
            raise ValueError(f"{pixels:,} pixels")
        kind = str(picture.format).lower()
        _save_webp(picture, memory)
    smaller = memory.getvalue()
    content, kind = (smaller, "webp") if len(smaller) < len(original) else (original, kind)
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _save_webp(picture: Image.Image, memory: io.BytesIO) -> None:
    if getattr(picture, "n_frames", 1) > 1:
        frames = [(frame.convert("RGB"), frame.info.get("duration", 250)) for frame in ImageSequence.Iterator(picture)]
        (first, _), *rest = frames
        durations = [duration for _, duration in frames]
        first.save(memory, "WEBP", save_all=True, append_images=[f for f, _ in rest], duration=durations, loop=0, lossless=True, method=3)
    else:
        picture.save(memory, "WEBP", lossless=True, method=4)


def energies_of(path: Path) -> dict[str, dict[str, Any]]:
    """The energies of every image, finite ones: "E(x)" and "E(x, y)" -> group -> (N,). Raises FileError."""
    found = read_npz(path, [f"{prefix}{group}" for prefix in ("", "joint_") for group in ENERGY_GROUPS])
    with reading(path, largest=None):
        finite = {name: values[np.isfinite(values)] for name, values in found.items()}
        wrong = [name for name, values in finite.items() if found[name].ndim != 1 or values.dtype.kind != "f"]
        if wrong:
            raise ValueError(f"no energies in {', '.join(wrong)}")
        return {
            title: {group: finite[f"{prefix}{group}"] for group in ENERGY_GROUPS} for title, prefix in (("E(x)", ""), ("E(x, y)", "joint_"))
        }


def render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("ebjdat.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = tables.number
    script = environment.get_template("script.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    script_values = {"script": Markup(script), "script_hash": f"sha256-{digest}"}  # noqa: S704 (the package's own file)
    return environment.get_template(template).render(**values, **script_values)


def write(
    profile: Profile,
    run: str,
    results: Path,
    card: dict[str, Any],
    rows: Sequence[Row],
    table: pd.DataFrame,
    findings: Sequence[Finding],
    out: Path,
    overrides: Sequence[str] = (),
) -> None:
    """Write the page. Figures of experiments with several seeds show the first seed, and say so. overrides: the run's, for commands."""
    seed = profile.seeds[0]
    details = {row.experiment: row.metrics for row in rows if row.seed == seed}
    protocols = profile.evaluation.attack.protocols
    radii = {name: p.radius for name, p in protocols.items() if p.norm == profile.evaluation.attack.standard.norm}
    sweep = inline.radius_sweep({name: d["sweep"] for name, d in details.items()}, radii, 1 / len(card["classes"]))
    marks = {m.name: best_marks(table, m) for m in METRICS}
    first = next(iter(details.values()))
    settings = differing_settings(profile)
    experiments = []
    for i, record in enumerate(table.to_dict("records")):
        name = record["experiment"]
        folder, mine = results / name / f"seed{seed}", [row for row in rows if row.experiment == name]
        histograms = energies_of(folder / "energy.npz")
        curve = tables.read_curve(folder / "finetune_curve.csv")
        checks = tables.checks_of(mine)
        experiments.append(
            {
                "name": name,
                "method": record["method"],
                "source": METHODS[record["method"]].source,
                "note": profile.experiments[name].note,
                "pretraining": profile.experiments[name].pretraining,
                "differences": differences(profile, name),
                "collapse": collapse_cell(pd.Series(record)),
                "cells": [
                    {"parts": cell_parts(pd.Series(record), m), "value": record.get(m.name), "mark": marks[m.name][i]} for m in METRICS
                ],
                "failed": [check for check in checks if check["passed"] is False],
                "checks": [check for check in checks if check["seed"] == seed],
                "rows": mine,
                "details": details[name],
                "settings": settings[name],
                "events": [(row.seed, event) for row in mine for event in row.metrics.get("events", [])],
                "samples": embed(folder / "samples.png"),
                "chains": embed(folder / "chains.gif"),
                "reliability": embed(folder / "reliability.png"),
                "energies": inline.inline(inline.energies(histograms), f"energy{i}", f"Histograms of energies under {name}"),
                "curves": inline.inline(inline.training_curves(curve), f"curves{i}", f"Training curves of {name}"),
            }
        )
    energy_lines = [[name, *(tables.number(d[key], ".2f") for key in ENERGY_COLUMNS)] for name, d in details.items()]
    text = render(
        "page.html.j2",
        run=run,
        card=card,
        seeds=profile.seeds,
        shown_seed=seed,
        metrics=METRICS,
        heads=[header_parts(m, table) for m in METRICS],
        experiments=experiments,
        kinds={e["name"]: e["method"] for e in experiments},
        trilemma=[(header_parts(m, table), m.better, inline.trilemma(table, m)) for m in METRICS if m.name in TRILEMMA and m.name in table],
        findings=findings,
        averaged=averaged_weights(rows),
        paper=profile.report.paper,
        protocol=tables.protocol(profile, card),
        released_says=PROTOCOLS[RELEASED].source if RELEASED in protocols else "",
        ece_bins=profile.evaluation.reliability.bins,
        side_by_side=tables.side_by_side(profile, rows),
        failed_checks=[check for check in tables.checks_of(rows) if check["passed"] is False],
        checks_n=profile.evaluation.attack.checks.n,
        sweeps=inline.inline(sweep, "sweep", "Accuracy under PGD at growing radii"),
        commands=[(row, *reproduce(run, results, row, overrides)) for row in rows],
        extractor=first["frechet_extractor"],
        sample_table=tables.sample_table(details),
        energy_table=[["E(x)", *ENERGY_COLUMNS.values()], *energy_lines],
        reliability_table=tables.reliability_table(details),
        ood_missing=first["ood_missing"],
        eps=profile.evaluation.attack.standard.radius,
    )
    write_text(out, text)


def write_audit(
    profile: Profile, run: str, results: Path, card: dict[str, Any], rows: Sequence[Row], findings: Sequence[Finding], out: Path
) -> None:
    """Write the audit page: claims with their verdicts, integrity checks, and models compared pair by pair."""
    checks: dict[str, dict[tuple[str, int], Any]] = {}
    says: dict[str, str] = {}
    for check in tables.checks_of(rows):
        name = check["name"] + (f" [{check['protocol']}]" if check["protocol"] else "")
        checks.setdefault(name, {})[check["experiment"], check["seed"]] = check
        if name not in says or check["passed"]:  # one that was not asked, or failed, says why, not what it measures
            says[name] = "warnings, each once" if check["name"] == "AutoAttack's own checks" else check["says"]
    seed = profile.seeds[0]
    pairs = {"PGD-20, all test examples": tables.pairwise(profile, results, seed, "pgd20")}
    if profile.evaluation.attack.standard.n:
        pairs["AutoAttack standard"] = tables.pairwise(profile, results, seed, "autoattack")
    text = render(
        "audit.html.j2",
        run=run,
        card=card,
        seeds=profile.seeds,
        shown_seed=seed,
        findings=findings,
        what_was_read=tables.WHAT_WAS_READ,
        checks=checks,
        says=says,
        checks_n=profile.evaluation.attack.checks.n,
        rows=rows,
        kinds={name: entry.method for name, entry in profile.experiments.items()},
        failed_checks=[check for check in tables.checks_of(rows) if check["passed"] is False],
        pairs={title: lines for title, lines in pairs.items() if lines},
    )
    write_text(out, text)


def best_marks(table: pd.DataFrame, metric: Metric) -> list[str]:
    """Per row "best", "tied" or "". A value is best only where its interval does not meet any other's.

    tied: the best value and those whose intervals meet its own. Nothing is marked where a value has no interval, since nothing
    says how much of the lead is chance; nor where all are tied.
    """
    none = [""] * len(table)
    if f"{metric.name}_low" not in table or metric.name == "train_seconds":
        return none
    found = table[[metric.name, f"{metric.name}_low", f"{metric.name}_high"]]
    measured = found.dropna(subset=[metric.name])
    if len(measured) < 2 or measured.isna().any().any():
        return none
    best = measured[metric.name].idxmax() if metric.better == "higher" else measured[metric.name].idxmin()
    low, high = found.loc[best, f"{metric.name}_low"], found.loc[best, f"{metric.name}_high"]
    meet = (found[f"{metric.name}_low"] <= high) & (found[f"{metric.name}_high"] >= low)
    if meet.sum() == len(measured):
        return none
    return [("best" if meet.sum() == 1 else "tied") if m else "" for m in meet]


def differing_settings(profile: Profile) -> dict[str, dict[str, Any]]:
    """Experiment -> its settings in which the profile's experiments differ; data and evaluation they share, a fresh start has none."""
    everything = {
        name: flat({key: value for key, value in profile.resolved(name).items() if key in ("model", "pretraining", "training")})
        for name in profile.experiments
    }
    keys = dict.fromkeys(key for found in everything.values() for key in found)
    varied = [key for key in keys if len({repr(found[key]) for found in everything.values() if key in found}) > 1]
    return {name: {key: found[key] for key in varied if key in found} for name, found in everything.items()}


def reproduce(run: str, results: Path, row: Row, overrides: Sequence[str]) -> tuple[str, str]:
    """The commands that make a row's results again, and what they leave open."""
    folder = results / row.experiment / f"seed{row.seed}"
    commits = {stage: read_json(folder / f"{stage}.json").get("git_commit", "unknown") for stage in STAGES}
    # a stage that ran at another commit than its training ran later; Snakemake kept the training, so its code was the same there
    chosen = next((c for c in reversed(commits.values()) if c != row.git_commit), row.git_commit)
    config = [f"profile={run.split('+')[0]}", *([f"overrides={join_overrides(overrides)}"] if overrides else [])]
    targets = [f"results/{run}/{row.experiment}/seed{row.seed}/{stage}.json" for stage in STAGES]
    lines = [shlex.join(["snakemake", "--cores", "all", "--config", *config, "--", *targets])]
    notes = []
    if len(set(commits.values())) > 1:
        notes.append("Stages ran at different commits: " + ", ".join(f"{stage} at {commit}" for stage, commit in commits.items()) + ".")
    if chosen == "unknown":
        notes.append("The commit is unknown, since the run was not made in a git checkout: use the code that it was made with.")
    else:
        lines.insert(0, shlex.join(["git", "checkout", printable(chosen.removesuffix("-dirty"))]))
    if any(commit.endswith("-dirty") for commit in commits.values()):
        notes.append("Some of the code or settings were changed and not committed (“-dirty”): what was changed is not in the commit.")
    return "\n".join(lines), " ".join(notes)
