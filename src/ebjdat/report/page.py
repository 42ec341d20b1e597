"""The HTML report and its audit page: files with everything inside, which open without network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from ebjdat.files import write_text
from ebjdat.params import RELEASED, Profile
from ebjdat.registry import METHODS, PROTOCOLS
from ebjdat.report import figures, tables
from ebjdat.report.claims import Finding
from ebjdat.report.tables import METRICS, Row, averaged_weights, cell_parts, collapse_cell, differences, header, header_parts, protocol


def embed(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("ebjdat.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def write(profile: Profile, run: str, results: Path, card: dict[str, Any], rows: Sequence[Row], table: pd.DataFrame, out: Path) -> None:
    """Write the page. Figures of experiments with several seeds show the first seed, and say so."""
    heads = {m.name: header(m, table) for m in METRICS}
    seed = profile.seeds[0]
    folders = {name: results / name / f"seed{seed}" for name in profile.experiments}
    values = {name: np.load(folder / "energy.npz", allow_pickle=False) for name, folder in folders.items()}
    groups = ("clean", "adversarial", "generated")
    curves = {name: pd.read_csv(folder / "finetune_curve.csv") for name, folder in folders.items()}
    details = {row.experiment: row.metrics for row in rows if row.seed == seed}
    protocols = profile.evaluation.attack.protocols
    radii = {name: p.radius for name, p in protocols.items() if p.norm == profile.evaluation.attack.standard.norm}
    sweeps = figures.radius_sweep({name: d["sweep"] for name, d in details.items()}, radii, 1 / len(card["classes"]))
    histograms = figures.energy_histograms(
        {n: {g: v[g] for g in groups} for n, v in values.items()},
        {n: {g: v[f"joint_{g}"] for g in groups} for n, v in values.items()},
    )
    first = next(iter(details.values()))
    text = render(
        "page.html.j2",
        run=run,
        card=card,
        seeds=profile.seeds,
        shown_seed=seed,
        heads=[header_parts(m, table) for m in METRICS],
        table=[
            {
                "experiment": record["experiment"],
                "source": METHODS[record["method"]].source,
                "note": profile.experiments[record["experiment"]].note,
                "differences": differences(profile, record["experiment"]),
                "collapse": collapse_cell(record),
                "cells": [cell_parts(record, m) for m in METRICS],
                "best": [_is_best(table, record, m.name, m.better) for m in METRICS],
            }
            for _, record in table.iterrows()
        ],
        averaged=averaged_weights(rows),
        events=[(row.experiment, row.seed, event) for row in rows for event in row.metrics.get("events", [])],
        paper=profile.report.paper,
        protocol=protocol(profile, card),
        released_says=PROTOCOLS[RELEASED].source if RELEASED in protocols else "",
        ece_bins=profile.evaluation.reliability.bins,
        side_by_side=tables.side_by_side(profile, rows),
        failed_checks=[check for check in tables.checks_of(rows) if check["passed"] is False],
        checks_n=profile.evaluation.attack.checks.n,
        sweeps=embed(figures.png(sweeps)),
        rows=rows,
        trilemma=embed(figures.png(figures.trilemma(table, METRICS, heads))),
        energies=embed(figures.png(histograms)),
        curves=embed(figures.png(figures.training_curves(curves))),
        grids={name: embed((folder / "samples.png").read_bytes()) for name, folder in folders.items()},
        chains={name: embed((folder / "chains.gif").read_bytes(), "gif") for name, folder in folders.items()},
        diagrams={name: embed((folder / "reliability.png").read_bytes()) for name, folder in folders.items()},
        extractor=first["frechet_extractor"],
        sample_table=tables.sample_table(details),
        reliability_table=tables.reliability_table(details),
        ood_missing=first["ood_missing"],
        details=details,
        eps=profile.evaluation.attack.standard.radius,
    )
    write_text(out, text)


def write_audit(
    profile: Profile, run: str, results: Path, card: dict[str, Any], rows: Sequence[Row], findings: Sequence[Finding], out: Path
) -> None:
    """Write the audit page: claims with their verdicts, integrity checks, and models compared pair by pair."""
    checks: dict[tuple[str, str], dict[tuple[str, int], Any]] = {}
    for check in tables.checks_of(rows):
        name = check["name"] + (f" [{check['protocol']}]" if check["protocol"] else "")
        says = "warnings, each once" if check["name"] == "AutoAttack's own checks" else check["says"]
        known = next((key for key in checks if key[0] == name), None)
        asked = known is None or all(other["passed"] is None for other in checks[known].values())
        row = (name, says) if known is None or (asked and check["passed"] is not None) else known
        checks[row] = {
            **(checks.pop(known) if known and row != known else checks.get(row, {})),
            (check["experiment"], check["seed"]): check,
        }
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
        checks=checks,
        checks_n=profile.evaluation.attack.checks.n,
        columns=[(row.experiment, row.seed) for row in rows],
        failed_checks=[check for check in tables.checks_of(rows) if check["passed"] is False],
        pairs=pairs,
    )
    write_text(out, text)


def _is_best(table: pd.DataFrame, record: pd.Series, name: str, better: str) -> bool:
    if name == "train_seconds" or name not in table or pd.isna(record.get(name)):
        return False
    best = table[name].max() if better == "higher" else table[name].min()
    return bool(record[name] == best)
