"""The HTML report and its audit page: self-contained files that open without network."""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageSequence

from ebjdat import jobs
from ebjdat.errors import printable
from ebjdat.files import read_json, read_npz, reading, write_text
from ebjdat.layout import Layout, place
from ebjdat.metrics import PANELS, TABLE
from ebjdat.registry import METHODS, PROTOCOLS
from ebjdat.report import inline
from ebjdat.report.claims import Finding
from ebjdat.report.collect import RunResult, checks_of, read_curve
from ebjdat.report.format import (
    WHAT_WAS_READ,
    averaged_weights,
    cell_parts,
    collapse_cell,
    differences,
    head_and_tail,
    header_parts,
    measured,
    number,
    protocol_note,
    seed_table,
    side_by_side,
)
from ebjdat.report.pairs import Comparison, pairwise
from ebjdat.settings import RELEASED, Profile, flat, join_overrides
from ebjdat.vocabulary import Metric

MOST_PIXELS = 100_000_000  # of a picture, over all its frames; the report's have a few million
ENERGY_GROUPS = ("clean", "adversarial", "generated")


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
    arrays = read_npz(path, [f"{prefix}{group}" for prefix in ("", "joint_") for group in ENERGY_GROUPS])
    with reading(path, largest=None):
        finite = {name: values[np.isfinite(values)] for name, values in arrays.items()}
        wrong = [name for name, values in finite.items() if arrays[name].ndim != 1 or values.dtype.kind != "f"]
        if wrong:
            raise ValueError(f"no energies in {', '.join(wrong)}")
        return {
            title: {group: finite[f"{prefix}{group}"] for group in ENERGY_GROUPS} for title, prefix in (("E(x)", ""), ("E(x, y)", "joint_"))
        }


def render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("ebjdat.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    script = environment.get_template("script.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    script_values = {"script": Markup(script), "script_hash": f"sha256-{digest}"}  # noqa: S704 (the package's own file)
    return environment.get_template(template).render(**values, **script_values)


@dataclass(frozen=True)
class Site:
    """What both pages are made from. run: the profile's name with its overrides."""

    profile: Profile
    run: str
    results: Path
    card: dict[str, Any]
    runs: Sequence[RunResult]
    findings: Sequence[Finding]
    comparisons: Sequence[Comparison]

    @property
    def shown_seed(self) -> int:
        """The seed of figures and of tables of one seed: the first."""
        return self.profile.seeds[0]

    @property
    def details(self) -> dict[str, dict[str, Any]]:
        """Experiment -> metrics of the shown seed."""
        return {run.experiment: run.metrics for run in self.runs if run.seed == self.shown_seed}

    def values(self) -> dict[str, Any]:
        """What both templates read."""
        return {
            "run": self.run,
            "card": self.card,
            "seeds": self.profile.seeds,
            "shown_seed": self.shown_seed,
            "findings": self.findings,
            "comparisons": self.comparisons,
            "checks_n": self.profile.evaluation.attack.checks.n,
            "kinds": {name: entry.method for name, entry in self.profile.experiments.items()},
            "failed_checks": failed(checks_of(self.runs)),
        }


def failed(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [check for check in checks if check["passed"] is False]


def write(site: Site, table: pd.DataFrame, out: Path, overrides: Sequence[str] = ()) -> None:
    """Write the report. Figures of experiments with several seeds show the first seed, and say so. overrides: the run's, for commands."""
    profile, details = site.profile, site.details
    protocols, standard = profile.evaluation.attack.protocols, profile.evaluation.attack.standard
    radii = {name: p.radius for name, p in protocols.items() if p.norm == standard.norm}
    sweep = inline.radius_sweep({name: d["sweep"] for name, d in details.items()}, radii, 1 / len(site.card["classes"]))
    first = next(iter(details.values()))
    text = render(
        "page.html.j2",
        **site.values(),
        metrics=TABLE,
        heads=[header_parts(m, table) for m in TABLE],
        experiments=experiment_sections(site, table),
        trilemma=[(header_parts(m, table), m.better, inline.trilemma(table, m)) for m in PANELS if m.name in table],
        averaged=averaged_weights(site.runs),
        paper=profile.report.paper,
        protocol=protocol_note(profile, site.card),
        released_says=PROTOCOLS[RELEASED].source if RELEASED in protocols else "",
        ece_bins=profile.evaluation.reliability.bins,
        side_by_side=side_by_side(profile, site.runs),
        head_and_tail=head_and_tail(profile, site.runs),
        sweeps=inline.inline(sweep, "sweep", "Accuracy under PGD at growing radii"),
        commands=[(run, *reproduce(jobs.measured(profile, run.experiment), site.run, site.results, run, overrides)) for run in site.runs],
        extractor=first["frechet_extractor"],
        sample_table=seed_table("samples", "experiment", details),
        energy_table=seed_table("energy", "E(x)", details),
        reliability_table=seed_table("reliability", "experiment", details),
        teacher_table=teacher_table(details),
        attack_table=measured(seed_table("attack", "experiment", details)),
        screen_table=measured(seed_table("screen", "experiment", details)),
        universal_table=measured(seed_table("universal", "experiment", details)),
        ood_missing=first["ood_missing"],
        eps=standard.radius,
    )
    write_text(out, text)


def teacher_table(details: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """What the students' teachers say; empty where there are none."""
    taught = {name: values for name, values in details.items() if "n_teaching" in values}
    return seed_table("teacher", "student", taught) if taught else []


def experiment_sections(site: Site, table: pd.DataFrame) -> list[dict[str, Any]]:
    """What the template shows of each experiment: its row of the main table, and its section."""
    profile, seed, details = site.profile, site.shown_seed, site.details
    marks = {m.name: best_marks(table, m) for m in TABLE}
    settings = differing_settings(profile)
    sections = []
    for i, record in enumerate(table.to_dict("records")):
        name, method = record["experiment"], record["method"]
        folder, own = site.results / place(name, seed), [run for run in site.runs if run.experiment == name]
        histograms = energies_of(folder / "energy.npz")
        curve = read_curve(folder / "finetune_curve.csv")
        checks = checks_of(own)
        sections.append(
            {
                "name": name,
                "method": method,
                "source": METHODS[method].source,
                "note": profile.experiments[name].note,
                "pretraining": profile.experiments[name].pretraining,
                "differences": differences(profile, name),
                "collapse": collapse_cell(pd.Series(record)),
                "cells": [
                    {"parts": cell_parts(pd.Series(record), m), "value": record.get(m.name), "mark": marks[m.name][i]} for m in TABLE
                ],
                "failed": failed(checks),
                "checks": [check for check in checks if check["seed"] == seed],
                "rows": own,
                "details": details[name],
                "settings": settings[name],
                "events": [(run.seed, event) for run in own for event in run.metrics.get("events", [])],
                "samples": embed(folder / "samples.png"),
                "chains": embed(folder / "chains.gif"),
                "reliability": embed(folder / "reliability.png"),
                "energies": inline.inline(inline.energies(histograms), f"energy{i}", f"Histograms of energies under {name}"),
                "curves": inline.inline(inline.training_curves(curve), f"curves{i}", f"Training curves of {name}"),
            }
        )
    return sections


def write_audit(site: Site, out: Path) -> None:
    """Write the audit page: claims with their verdicts, integrity checks, and models compared pair by pair."""
    checks: dict[str, dict[tuple[str, int], Any]] = {}
    says: dict[str, str] = {}
    for check in checks_of(site.runs):
        name = check["name"] + (f" [{check['protocol']}]" if check["protocol"] else "")
        checks.setdefault(name, {})[check["experiment"], check["seed"]] = check
        if name not in says or check["passed"]:  # one that was skipped, or failed, states why, not what it measures
            says[name] = "warnings, each once" if check["name"] == "AutoAttack's own checks" else check["says"]
    columns = {"PGD-20, all test examples": "pgd20"}
    if site.profile.evaluation.attack.standard.n:
        columns["AutoAttack standard"] = "autoattack"
    pairs = {title: pairwise(site.profile, site.results, site.shown_seed, column) for title, column in columns.items()}
    text = render(
        "audit.html.j2",
        **site.values(),
        what_was_read=WHAT_WAS_READ,
        checks=checks,
        says=says,
        rows=site.runs,
        pairs={title: lines for title, lines in pairs.items() if lines},
    )
    write_text(out, text)


def best_marks(table: pd.DataFrame, metric: Metric) -> list[str]:
    """Per row "best", "tied" or "". A value is best only where its interval overlaps no other.

    tied: the best value and those whose intervals overlap its own. Nothing is marked where a value has no interval, since then
    how much of the lead is chance is unknown; nor where all are tied.
    """
    none = [""] * len(table)
    if f"{metric.name}_low" not in table or metric.unit == "seconds":  # times also depend on what else the machine does
        return none
    columns = table[[metric.name, f"{metric.name}_low", f"{metric.name}_high"]]
    measured = columns.dropna(subset=[metric.name])
    if len(measured) < 2 or measured.isna().any().any():
        return none
    best = measured[metric.name].idxmax() if metric.better == "higher" else measured[metric.name].idxmin()
    low, high = columns.loc[best, f"{metric.name}_low"], columns.loc[best, f"{metric.name}_high"]
    meet = (columns[f"{metric.name}_low"] <= high) & (columns[f"{metric.name}_high"] >= low)
    if meet.sum() == len(measured):
        return none
    return [("best" if meet.sum() == 1 else "tied") if m else "" for m in meet]


def differing_settings(profile: Profile) -> dict[str, dict[str, Any]]:
    """Experiment -> its settings in which the profile's experiments differ; data and evaluation they share, a fresh start has none."""
    everything = {
        name: flat({key: value for key, value in profile.resolved(name).items() if key in ("model", "pretraining", "training")})
        for name in profile.experiments
    }
    keys = dict.fromkeys(key for settings in everything.values() for key in settings)
    varied = [key for key in keys if len({repr(settings[key]) for settings in everything.values() if key in settings}) > 1]
    return {name: {key: settings[key] for key in varied if key in settings} for name, settings in everything.items()}


def reproduce(stages: Sequence[str], run: str, results: Path, result: RunResult, overrides: Sequence[str]) -> tuple[str, str]:
    """The commands that reproduce a run's results, all these stages, and notes on what they cannot settle."""
    at = place(result.experiment, result.seed)
    commits = {stage: read_json(results / at / f"{stage}.json").get("git_commit", "unknown") for stage in stages}
    # a stage that ran at another commit than its training ran later; Snakemake kept the training, so its code had not changed
    chosen = next((c for c in reversed(commits.values()) if c != result.git_commit), result.git_commit)
    config = [f"profile={run.split('+')[0]}", *([f"overrides={join_overrides(overrides)}"] if overrides else [])]
    targets = [Layout(run).result(at, f"{stage}.json") for stage in stages]
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
