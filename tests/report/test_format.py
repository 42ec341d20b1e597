"""Cells and tables of text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ebjdat.metrics import TABLE
from ebjdat.report.collect import RunResult
from ebjdat.report.format import (
    averaged_weights,
    cell,
    collapse_cell,
    differences,
    effective_radius,
    head_and_tail,
    header,
    seed_table,
    side_by_side,
    write_markdown,
)
from ebjdat.report.summary import aggregate
from ebjdat.settings import AdaptiveSettings, Profile, ReportSettings, load

from ..conftest import ROOT
from .results import CARD, with_metrics

METRIC = {metric.name: metric for metric in TABLE}


def test_cells_and_headings_of_the_main_table(profile: Profile, runs: list[RunResult]) -> None:
    table = aggregate(profile, with_metrics(runs, classifier={"autoattack_acc": None}))
    assert cell(table.iloc[0], METRIC["clean_acc"]) == "90.0 [82.6, 94.5]"
    assert cell(table.iloc[0], METRIC["autoattack_acc"]) == "–"
    assert header(METRIC["clean_acc"], table) == "clean %, n=100"
    assert header(METRIC["frechet"], table) == "Fréchet (reference), n=200"
    assert header(METRIC["frechet"], table.assign(frechet_extractor="inception")) == "FID, n=200"
    asked = dataclasses.replace(profile, report=ReportSettings(paper="cifar10"))
    assert cell(aggregate(asked, runs).iloc[3], METRIC["clean_acc"]).endswith("(paper 90.3)")


def test_frequent_and_rare_classes_have_columns_where_they_were_measured(profile: Profile, runs: list[RunResult]) -> None:
    assert head_and_tail(profile, runs) == []
    own = {"clean_tail_acc": 0.5, "clean_tail_correct": 40, "n_tail": 80, "clean_head_acc": 0.9, "clean_head_correct": 18, "n_head": 20}
    ensemble = {"released_autoattack_tail_acc": 0.25, "released_autoattack_tail_correct": 1, "released_n_attack_tail": 4}
    heads, *lines = head_and_tail(profile, with_metrics(runs, classifier=own, eb_jdat=ensemble))
    assert heads == ["experiment", "standard: clean %, head", "standard: clean %, tail", "released: ensemble %, tail"]
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["classifier"] == ["90.0 [69.9, 97.2]", "50.0 [39.3, 60.7]", "–"]
    assert by_name["eb_jdat"] == ["–", "–", "25.0 [4.6, 69.9]"]
    assert by_name["pgd_at"] == ["–"] * 3


def test_cells_of_several_seeds(three_seeds: Profile, three_runs: list[RunResult]) -> None:
    assert cell(aggregate(three_seeds, three_runs).iloc[0], METRIC["clean_acc"]) == "89.0 ± 1.0"
    more = {1: {"recoveries": 2, "collapse_epoch": 5}, 2: {"recoveries": 0, "collapse_epoch": None}}
    runs = [with_metrics([run], eb_jdat=more.get(run.seed, {}))[0] for run in three_runs]
    table = aggregate(three_seeds, runs).set_index("experiment")
    assert collapse_cell(table.loc["eb_jdat"]) == "2 of 3: epoch 2, 5; 3 healed"
    assert collapse_cell(table.loc["pgd_at"]) == "–"


def test_averaged_weights_beside_the_raw_ones(profile: Profile, runs: list[RunResult], tmp_path: Path) -> None:
    assert averaged_weights(runs) == []
    runs = with_metrics(runs, classifier={"ema_clean_acc": 0.95, "ema_pgd20_acc": 0.55, "ema_frechet": 11.0})
    heads, *lines = averaged_weights(runs)
    assert heads == ["experiment", "seed", "clean %", "PGD-20 %", "AutoAttack %", "Fréchet"]
    assert lines == [["classifier", "0", "90.0 → 95.0", "50.0 → 55.0", "–", "12.50 → 11.00"]]
    write_markdown(aggregate(profile, runs), runs, profile, CARD, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "90.0 → 95.0" in text
    assert "| eb_jdat | 87.0 [79.0, 92.2] |" in text


def test_tables_of_one_seed_show_what_the_metrics_name(runs: list[RunResult]) -> None:
    """Values of `fill`: percent, thousandfold, spread, n, intervals; a name with a place once for each that was measured."""
    values = {"inception_score": 8.0, "frechet_buffer": 4.0, "n_buffer": 99, "detect_auroc_energy_released": 0.6}
    values |= {"detect_auroc_energy_released_low": 0.5, "detect_auroc_energy_released_high": 0.7, "ece": None}
    details = {run.experiment: run.metrics for run in with_metrics(runs[:2], classifier=values)}
    heads, first, second = seed_table("samples", "experiment", details)
    assert dict(zip(heads, first, strict=True)) == {
        "experiment": "classifier",
        "Fréchet": "12.50 (n = 200)",
        "KID ×1000": "1.00 ± 0.50",
        "precision %": "50.0",
        "recall %": "25.0",
        "score": "8.00",
        "Fréchet, E(x, y) chains": "–",
        "Fréchet, buffer": "4.00 (n = 99)",
        "Fréchet, released": "7.25 (n = 90)",
    }
    assert second[5] == "5.00 ± 0.10"  # of the reference classifier, where Inception gave none
    heads, first, second = seed_table("reliability", "experiment", details)
    assert heads == ["experiment", "ECE %", "ECE, scaled %", "temperature", "NLL", "OOD: noise (energy)", "PGD, released (energy)"]
    assert first == ["classifier", "–", "1.0", "1.50", "0.300", "90.0 [85.0, 95.0]", "60.0 [50.0, 70.0]"]
    assert second[-1] == "–"
    heads, _, second = seed_table("energy", "E(x)", details)
    assert (heads[0], heads[-1], second[4], second[-1]) == ("E(x)", "W₁ gen.", "3.00", "1.00")


def test_legends_state_what_an_experiment_is() -> None:
    full = load(ROOT / "params/digits-full.yaml")
    assert differences(full, "classifier") == "optimizer.lr = 0.05"
    assert differences(full, "eb_jdat_sadajem") == "on SADA-JEM, arXiv 2209.07959, paper form"
    assert differences(full, "eb_jdat_released") == "on JEM++, arXiv 2109.09032, released form"
    assert "weights.w2 = 0" in differences(full, "ablation_w101")


def test_protocols_side_by_side_with_their_radii_and_differences(profile: Profile, runs: list[RunResult]) -> None:
    heads, first, *_ = side_by_side(profile, runs)
    cells = dict(zip(heads, first, strict=True))
    assert cells["standard: PGD-20 %, radius L∞ 0.15"] == "50.0 [40.4, 59.6]"
    assert cells["released: PGD-20 %, radius L∞ 0.075"] == "70.0 [60.4, 78.1]"
    assert cells["released − standard, PGD"] == "+20.0"
    assert cells["standard: AutoAttack standard %, radius L∞ 0.15, n=8"].startswith("45.0 [")
    assert cells["released: ensemble %, radius L∞ 0.075, n=8"].startswith("70.0 [")
    assert cells["released − standard, ensemble"] == "+25.0"
    assert not any("standard_l2 − standard" in head for head in heads)  # other norms have no difference
    cifar = load(ROOT / "params/cifar10.yaml")
    assert [effective_radius(cifar, name) for name in ("standard", "released", "standard_l2")] == ["L∞ 8/255", "L∞ 4/255", "L2 0.5"]


def test_what_an_adaptive_attack_broke_stands_beside_the_ensemble(three_seeds: Profile, three_runs: list[RunResult]) -> None:
    """Accuracy after both, over seeds; and the count over all seeds, as attack.json has it."""
    assert not any("energy_ce" in head for head in side_by_side(three_seeds, three_runs)[0])
    attack = three_seeds.evaluation.attack
    standard = attack.standard.model_copy(update={"adaptive_attacks": {"energy_ce": AdaptiveSettings()}})
    attack = attack.model_copy(update={"protocols": {**attack.protocols, "standard": standard}})
    asked = dataclasses.replace(three_seeds, evaluation=three_seeds.evaluation.model_copy(update={"attack": attack}))
    more = {run.seed: {"energy_ce_acc": 0.3 + run.seed / 10, "energy_ce_correct": 8, "energy_ce_alone": run.seed} for run in three_runs}
    runs = [with_metrics([run], classifier=more[run.seed])[0] for run in three_runs]
    heads, first, second, *_ = side_by_side(asked, runs)
    assert heads[-2:] == [f"standard: ensemble, then energy_ce %, n={standard.n}", "standard: broken by energy_ce alone"]
    assert first[-2].startswith("40.0 [")
    assert first[-1] == "3 of 60"
    assert second[-2:] == ["–", "–"]
