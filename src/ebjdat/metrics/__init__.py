"""Every metric once: its name, unit, direction, meaning, sample size, interval, and where it is shown.

Result files, summary.csv, DVC, MLflow and the report use these names; docs/metrics.md is made from this table. A metric is added
by an entry here, beside the code that computes it and its test.

training, evaluation, other: the entries. parts: what they share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ebjdat import registry
from ebjdat.metrics.evaluation import EVALUATION, HEADINGS
from ebjdat.metrics.other import OTHER
from ebjdat.metrics.parts import ENERGY_ATTACKS, GROUPS, TEACHING
from ebjdat.metrics.training import TRAINING
from ebjdat.vocabulary import Metric, Vocabulary

__all__ = [
    "BARS",
    "COLUMNS",
    "ENERGY_ATTACKS",
    "FILES",
    "GROUPS",
    "HEADLINE",
    "METRICS",
    "NEEDED",
    "PANELS",
    "PLACES",
    "STAGES",
    "SUMMARY",
    "TABLE",
    "TEACHING",
    "VOCABULARY",
    "describe",
    "find",
    "markdown",
    "sign",
]

# heading -> where these names occur
STAGES: Mapping[str, str] = {
    "provenance": "What a result is of, in every file that states it. Text and settings, not measurements.",
    "training": "`pretrain.json`, `finetune.json`, and the header of checkpoints.",
    "curve": "`pretrain_curve.csv`, `finetune_curve.csv` and MLflow's curves: a row per epoch. Means over the epoch's batches, in the mode "
    "the network trains in, unless stated otherwise.",
    **HEADINGS,
    "report": "`summary.csv` (a row per experiment and seed) and `table.csv` (a row per experiment: means over seeds); also names above.",
    "bench": "What `ebjdat bench` prints and saves: a training step's speed ([how fast](performance.md)).",
    "system": "MLflow's system metrics, on the run of each stage: of the whole machine, unless stated otherwise.",
}

METRICS: tuple[Metric, ...] = (*TRAINING, *EVALUATION, *OTHER)

_SUMMARY = {m.summary: (m.plain, m) for m in METRICS} | {m.released: (f"released_{m.plain}", m) for m in METRICS}
_COLUMNS = tuple(entry for place, entry in sorted(_SUMMARY.items(), key=lambda item: item[0]) if place)

# The contract with other programs: columns of summary.csv, in this order. New ones come at the end.
SUMMARY = tuple(name for name, _ in _COLUMNS)
# What DVC shows and compares (`dvc metrics show`), and its bar charts: column of table.csv -> title.
HEADLINE = tuple(name for name, metric in _COLUMNS if metric.dvc)
BARS: Mapping[str, str] = {metric.plain: metric.bar for _, metric in _COLUMNS if metric.bar}
# Columns of the report's main table, each under its plain name; those with a panel in its figure; columns of tables of one seed.
TABLE = tuple(replace(metric, name=name) for name, metric in _COLUMNS if metric.label and name == metric.plain)
PANELS = tuple(metric for metric in TABLE if metric.panel)
COLUMNS = tuple((metric, column) for metric in METRICS for column in metric.columns)
# Result file -> names that it must have.
FILES = tuple(dict.fromkeys(file for metric in METRICS for file in metric.needed))
NEEDED: Mapping[str, tuple[Metric, ...]] = {
    file: tuple(replace(metric, name=metric.plain) for metric in METRICS if file in metric.needed) for file in FILES
}

# What `<place>` in a pattern may be. Protocols are settings, so any word may; `describe` takes the real ones.
PLACES: Mapping[str, tuple[str, Collection[str]]] = {
    "protocol": ("a protocol of the settings, also your own", ()),
    "steps": ("a whole number", ()),
    "gpu": ("a GPU's number, from 0", ()),
    "attack": ("an attack of the ensemble", tuple(registry.ATTACKS)),
    "adaptive": ("an adaptive attack, after the ensemble", tuple(registry.ADAPTIVE)),
    "score": ("an out-of-distribution score", ("energy", "max_probability", "gradient_norm")),
    "set": ("an out-of-distribution set", tuple(registry.OOD_SETS)),
    "column": ("a column of the report's main table", tuple(metric.name for metric in TABLE)),
}

VOCABULARY = Vocabulary(METRICS, PLACES)
describe, find = VOCABULARY.describe, VOCABULARY.find


def sign(name: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither is."""
    return {"higher": 1, "lower": -1, "": 0}[describe(name).better]


def markdown() -> str:
    """docs/metrics.md."""
    return VOCABULARY.markdown(STAGES, SUMMARY)
