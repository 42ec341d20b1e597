"""The table of metrics against what the stages really write, against MLflow's own names, and against its document."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ebjdat import metrics
from ebjdat.cli import app
from ebjdat.files import read_json
from ebjdat.metrics import METRICS, STAGES, describe
from ebjdat.tracking import journal
from ebjdat.vocabulary import UnknownNameError

from .chain import OWN, Chain
from .conftest import ROOT

HOMES = {  # headings whose names a file may have
    "pretrain": {"training", "provenance"},
    "finetune": {"training", "provenance"},
    "attack": {"attack", "provenance"},
    "generate": {"generate", "provenance"},
    "energy": {"energy", "provenance"},
    "reliability": {"reliability", "provenance"},
}


@pytest.fixture
def written(chain: Chain) -> Path:
    """Results of every stage."""
    return chain.results


def found(results: Path) -> Iterator[tuple[str, str, Any]]:
    """(file's stem, name, value) of every key of every JSON and every column of every CSV."""
    for path in sorted(results.rglob("*.json")):
        content = read_json(path)
        for part in content.values() if path.stem == "metrics" else [content]:  # an entry per experiment, for DVC
            yield from ((path.stem, name, value) for name, value in part.items())
    for path in sorted(results.rglob("*.csv")):
        for row in csv.DictReader(path.open()):
            yield from ((path.stem, name, value) for name, value in row.items())


def test_every_name_that_is_written_is_in_the_vocabulary(written: Path) -> None:
    seen = list(found(written))
    assert {stem for stem, *_ in seen} == {*HOMES, "pretrain_curve", "finetune_curve", "summary", "metrics", "table"}
    for stem, name, value in seen:
        quantity = describe(name, protocols=("released", OWN, "standard"))
        if stem in HOMES:
            assert quantity.stage in HOMES[stem], (stem, name)
        if stem.endswith("_curve"):
            assert quantity.stage == "curve" or name in ("energy_clean", "energy_adversarial", "energy_generated"), name
        if value in (None, ""):
            continue
        if quantity.unit == "fraction":
            assert 0 <= float(value) <= 1, (stem, name, value)
        if quantity.unit == "count":
            assert float(value) >= 0, (stem, name, value)
            assert float(value) == int(float(value)), (stem, name, value)


def test_every_file_that_a_stage_writes_is_named_with_its_sha256(written: Path) -> None:
    told = {path.parent / name: value for path in written.rglob("seed0/*.json") for name, value in read_json(path)["files"].items()}
    there = [path for path in written.rglob("seed0/*") if path.suffix not in (".json", ".jsonl")]
    assert told == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in there}
    assert {path.suffix for path in there} == {".csv", ".parquet", ".npz", ".png", ".gif"}


def test_every_entry_is_written_or_says_when(written: Path) -> None:
    names = {name for _, name, _ in found(written)}
    used = {describe(name, protocols=("released", OWN, "standard")).name for name in names}
    missing = {q.name for q in METRICS if q.name not in used and not q.only and q.stage not in ("system", "bench")}
    assert missing == set()


def test_every_name_that_goes_to_mlflow_is_in_the_vocabulary(written: Path) -> None:
    stages, names = set(), set()
    for path in written.rglob("*.journal.jsonl"):
        events = journal.read(path)
        assert events[0].begin
        stages.add(events[0].begin.stage)
        for event in events[1:]:
            names |= {*(event.metrics or {}), *(event.system or {}), *event.final, *(event.result.metrics if event.result else {})}
    assert stages == {"pretrain", "finetune", "attack", "generate", "energy", "reliability", "report"}
    assert {"loss", "clean_acc", "train_seconds", "system/cpu_utilization_percentage"} <= names
    for name in names:
        describe(name, protocols=("released", OWN, "standard"))
    assert all(describe(name).stage == "system" for name in names if name.startswith("system/"))


@pytest.mark.parametrize(
    ("name", "entry", "better", "unit"),
    [
        ("clean_acc", "[ema_][<protocol>_]clean_acc", "higher", "fraction"),
        ("released_pgd20_acc", "[ema_][<protocol>_]pgd<steps>_acc", "higher", "fraction"),
        ("pgd20_acc_first_n", "[<protocol>_]pgd<steps>_acc_first_n", "higher", "fraction"),
        ("ema_standard_l2_after_fab_t_correct", "[ema_][<protocol>_]after_<attack>_correct", "higher", "count"),
        ("energy_ce_acc", "[ema_][<protocol>_]<adaptive>_acc", "higher", "fraction"),
        ("standard_l2_energy_ce_alone", "[ema_][<protocol>_]<adaptive>_alone", "lower", "count"),
        ("released_energy_ce_alone_share_low", "[ema_][<protocol>_]<adaptive>_alone_share_(low|high)", "", "fraction"),
        ("ema_validation_clean_acc", "[ema_]validation_clean_acc", "higher", "fraction"),
        ("frechet_buffer", "[<protocol>_]frechet_buffer", "lower", "squared distance of features"),
        ("detect_auroc_energy_standard_l2_low", "detect_auroc_(energy|max_probability)_<protocol>_(low|high)", "", "fraction"),
        ("ood_auroc_gradient_norm_noise", "ood_auroc_<score>_<set>", "higher", "fraction"),
        ("kid_buffer", "[<protocol>_]kid[_conditional|_buffer]", "lower", "number"),
        ("n_ood_in", "n_ood_in", "", "count"),
        ("energy_gap_generated_sd", "<column>_sd", "", "as the column"),
        ("train_seconds", "train_seconds", "lower", "seconds"),
        ("system/gpu_1_power_usage_watts", "system/gpu_<gpu>_power_usage_watts", "", "watts"),
    ],
)
def test_a_name_is_found_with_its_unit_and_direction(name: str, entry: str, better: str, unit: str) -> None:
    metric = describe(name)
    assert (metric.name, metric.better, metric.unit) == (entry, better, unit)


@pytest.mark.parametrize("name", ["acc_clean", "pgd_acc", "ood_auroc_entropy_noise", "after_magic_correct", "other_clean_acc", ""])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError, match="is not measured"):
        describe(name, protocols=("released",))


def test_entries_are_complete_and_unique() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert {m.stage for m in METRICS} == set(STAGES)
    assert all(m.meaning and m.unit and m.better in ("higher", "lower", "") for m in METRICS)
    assert [metrics.sign(name) for name in ("clean_acc", "frechet", "n_test")] == [1, -1, 0]


def test_names_that_an_entry_refers_to_are_entries() -> None:
    """Counts, standard errors, spreads, and every name that a table, summary.csv or DVC shows."""
    for metric in metrics.TABLE:
        assert metric.label
        assert metric.better
        assert not metric.is_pattern
    for name in (*metrics.SUMMARY, *metrics.BARS, *(m.name for needed in metrics.NEEDED.values() for m in needed)):
        describe(name)
    for metric, column in metrics.COLUMNS:
        shown = metrics.VOCABULARY.pattern(column.name or metric.plain)
        assert "<" in column.name or shown.pattern == (column.name or metric.plain)
        for name in filter(None, (metric.n, column.n, column.spread, f"{metric.plain}_se" * (metric.interval in ("normal", "signed")))):
            describe(name)
    positions = [place for m in METRICS for place in (m.summary, m.released) if place]
    assert sorted(positions) == list(range(1, len(positions) + 1))
    assert metrics.HEADLINE[:1] == tuple(metrics.BARS)[:1] == ("clean_acc",)


def test_the_document_is_up_to_date() -> None:
    """Else: ebjdat metrics --markdown > docs/metrics.md"""
    made = CliRunner().invoke(app, ["metrics", "--markdown"]).output
    assert (ROOT / "docs/metrics.md").read_text() == made


def test_the_command_explains_one_name_and_lists_all() -> None:
    one = json.loads(CliRunner().invoke(app, ["metrics", "released_pgd20_acc", "--json"]).output)
    assert [(entry["better"], entry["unit"]) for entry in one] == [("higher", "fraction")]
    listed = json.loads(CliRunner().invoke(app, ["metrics", "--json"]).output)
    assert [(entry["name"], entry["meaning"]) for entry in listed] == [(m.name, m.meaning) for m in METRICS]
    assert "higher" in CliRunner().invoke(app, ["metrics", "released_pgd20_acc"]).output
    unknown = CliRunner().invoke(app, ["metrics", "clen_acc"])
    assert unknown.exit_code == 1
    assert "did you mean" in unknown.output


def test_the_report_draws_every_curve_that_training_writes(written: Path) -> None:
    """By the names that they have: one that the report does not know would be missing without a word."""
    import pandas as pd

    from ebjdat.report import inline

    (path,) = written.rglob("finetune_curve.csv")
    frame = pd.read_csv(path)
    above, below = inline.training_curves(frame).axes
    shown = [100 * frame["validation_clean_acc"], 100 * frame["validation_robust_acc"]]
    assert [line.get_ydata().tolist() for line in above.lines] == [values.tolist() for values in shown]
    assert [line.get_label() for line in below.lines] == ["clean", "adversarial", "generated"]
