"""The HTML report: one file with everything inside, opens without network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from ebjdat.files import write_text
from ebjdat.params import Profile
from ebjdat.registry import METHODS
from ebjdat.report import figures
from ebjdat.report.tables import METRICS, Row, averaged_weights, cell_parts, collapse_cell, differences, header, header_parts, protocol


def embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write(profile: Profile, run: str, results: Path, card: dict[str, Any], rows: Sequence[Row], table: pd.DataFrame, out: Path) -> None:
    """Write the page. Figures of experiments with several seeds show the first seed, and say so."""
    heads = {m.name: header(m, table) for m in METRICS}
    seed = profile.seeds[0]
    folders = {name: results / name / f"seed{seed}" for name in profile.experiments}
    values = {name: np.load(folder / "energy.npz", allow_pickle=False) for name, folder in folders.items()}
    groups = ("clean", "adversarial", "generated")
    curves = {name: pd.read_csv(folder / "finetune_curve.csv") for name, folder in folders.items()}
    template = resources.files("ebjdat.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    write_text(
        out,
        environment.from_string(template).render(
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
            rows=rows,
            trilemma=embed(figures.png(figures.trilemma(table, METRICS, heads))),
            energies=embed(
                figures.png(
                    figures.energy_histograms(
                        {n: {g: v[g] for g in groups} for n, v in values.items()},
                        {n: {g: v[f"joint_{g}"] for g in groups} for n, v in values.items()},
                    )
                )
            ),
            curves=embed(figures.png(figures.training_curves(curves))),
            grids={name: embed((folder / "samples.png").read_bytes()) for name, folder in folders.items()},
            details={row.experiment: row.metrics for row in rows if row.seed == seed},
            eps=profile.evaluation.attack.eps,
        ),
    )


def _is_best(table: pd.DataFrame, record: pd.Series, name: str, better: str) -> bool:
    if name == "train_seconds" or name not in table or pd.isna(record.get(name)):
        return False
    best = table[name].max() if better == "higher" else table[name].min()
    return bool(record[name] == best)
