"""summary.csv and metrics.json as contracts; means and intervals against closed forms and scipy."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from ebjdat.intervals import wilson
from ebjdat.metrics import HEADLINE, SUMMARY
from ebjdat.report.collect import RunResult
from ebjdat.report.summary import aggregate, estimate, headline, paper_numbers, spreadsheet, write_summary
from ebjdat.settings import Profile, ReportSettings, load

from ..conftest import ROOT
from .results import with_metrics

CONTRACT = (
    *("experiment", "method", "seed", "n_test", "clean_acc", "pgd20_acc", "n_attack", "autoattack_acc", "frechet", "frechet_extractor"),
    *("n_samples", "energy_gap_adversarial", "energy_gap_generated", "train_seconds", "params_hash", "data_hash", "git_commit"),
    *("collapse_epoch", "recoveries", "released_pgd20_acc", "released_autoattack_acc", "checks_failed", "ece"),
)


def written(runs: list[RunResult], path: Path) -> list[dict[str, str]]:
    write_summary(runs, path)
    return list(csv.DictReader(path.open()))


def test_summary_is_the_contract(profile: Profile, runs: list[RunResult], tmp_path: Path) -> None:
    rows = written(runs, tmp_path / "summary.csv")
    assert tuple(rows[0])[: len(CONTRACT)] == CONTRACT
    assert [(row["experiment"], row["seed"]) for row in rows] == [(e, str(s)) for e in profile.experiments for s in profile.seeds]
    first = rows[0]
    assert float(first["clean_acc"]) == 0.9  # a fraction
    assert float(first["train_seconds"]) == 15.0  # with its pretraining
    assert first["params_hash"] == profile.params_hash(first["experiment"], 0)
    assert (first["data_hash"], first["git_commit"], first["frechet_extractor"]) == ("d1", "abc", "reference")
    diverged = {row["experiment"]: (row["collapse_epoch"], row["recoveries"]) for row in rows}
    assert (diverged["eb_jdat"], diverged["pgd_at"]) == (("2.0", "1"), ("", "0"))
    documented = (ROOT / "docs/results-format.md").read_text().split("```")[1]
    assert re.split(r",\s*", documented.strip()) == list(CONTRACT)
    assert SUMMARY[: len(CONTRACT)] == CONTRACT  # new ones come after these


def test_headline_metrics_are_means_over_seeds_of_what_was_measured() -> None:
    runs = [
        RunResult("a", "m", seed, "", "", "", {"clean_acc": value, "ece": ece, "autoattack_acc": None, "n_test": 5})
        for seed, value, ece in ((0, 0.5, 0.1), (1, 1.0, None))
    ]
    assert headline(runs) == {"a": {"clean_acc": 0.75}}
    assert set(HEADLINE) <= set(SUMMARY)
    assert set(HEADLINE) >= {
        *("clean_acc", "pgd20_acc", "autoattack_acc", "released_pgd20_acc", "released_autoattack_acc", "frechet"),
        *("energy_gap_adversarial", "energy_gap_generated", "ece", "checks_failed", "recoveries", "train_seconds"),
    }


def test_a_value_that_was_not_measured_is_empty(profile: Profile, runs: list[RunResult], tmp_path: Path) -> None:
    runs = with_metrics(runs, classifier={"autoattack_acc": None})
    assert written(runs, tmp_path / "summary.csv")[0]["autoattack_acc"] == ""
    assert np.isnan(aggregate(profile, runs)["autoattack_acc"].iloc[0])


def test_one_seed_has_intervals_over_examples(profile: Profile, runs: list[RunResult]) -> None:
    record = aggregate(profile, runs).iloc[0]
    assert (record["clean_acc_low"], record["clean_acc_high"]) == pytest.approx(wilson(90, 100))
    assert record["energy_gap_adversarial_high"] == pytest.approx(2.0 + 1.959964 * 0.1, abs=1e-5)
    assert record["autoattack_acc_n"] == 20
    assert "frechet_low" not in record
    released = estimate([runs[0].metrics], "pgd20_acc", "released")
    assert released is not None
    assert (released.value, released.low, released.high, released.n) == (0.7, *wilson(70, 100), 100)
    near_zero = {"energy_gap_generated": 0.1, "energy_gap_generated_se": 1.0}
    low = aggregate(profile, with_metrics(runs, classifier=near_zero)).iloc[0]["energy_gap_generated_low"]
    assert low == 0  # a gap is not negative


def test_a_groups_interval_is_of_its_own_images() -> None:
    """Not of all images of the attack."""
    metrics = {"clean_correct": 90, "n_test": 100, "clean_tail_correct": 50, "clean_tail_acc": 50 / 80, "n_tail": 80}
    metrics |= {"released_pgd20_head_acc": 0.5, "released_pgd20_head_correct": 10, "released_n_head": 20}
    for name, protocol, counts in (("clean_tail_acc", "standard", (50, 80)), ("pgd20_head_acc", "released", (10, 20))):
        found = estimate([metrics], name, protocol)
        assert found is not None
        assert (found.value, found.low, found.high, found.n) == (counts[0] / counts[1], *wilson(*counts), counts[1])


def test_several_seeds_have_spread_and_student_intervals(three_seeds: Profile, three_runs: list[RunResult]) -> None:
    record = aggregate(three_seeds, three_runs).iloc[0]
    expected = scipy.stats.ttest_1samp([0.90, 0.89, 0.88], 0).confidence_interval(0.95)
    assert (record["clean_acc"], record["clean_acc_sd"]) == pytest.approx((0.89, 0.01))
    assert (record["clean_acc_low"], record["clean_acc_high"]) == pytest.approx((expected.low, expected.high))


def test_the_papers_numbers_are_shown_only_where_asked(profile: Profile, runs: list[RunResult]) -> None:
    assert not any(column.endswith("_paper") for column in aggregate(profile, runs))
    asked = dataclasses.replace(profile, report=ReportSettings(paper="cifar10"))
    table = aggregate(asked, runs).set_index("experiment")
    assert table.loc["eb_jdat", "autoattack_acc_paper"] == pytest.approx(0.6478)
    assert "frechet_paper" not in table  # a distance under other features is not an FID
    assert np.isnan(table.loc["pgd_at", "clean_acc_paper"])
    inception = [dataclasses.replace(run, metrics={**run.metrics, "frechet_extractor": "inception"}) for run in runs]
    assert aggregate(asked, inception).set_index("experiment").loc["jempp", "frechet_paper"] == pytest.approx(37.12)


def test_the_papers_numbers_are_those_of_the_base_and_the_ablation() -> None:
    """Against the table of the paper; a variant that the paper does not report has none."""
    full = load(ROOT / "params/cifar10.yaml")
    measured = {
        "jem": 4.28,
        "jempp": 41.06,
        "sadajem": 29.63,
        "mart": 50.67,
        "awp": 51.90,
        "las_awp": 55.52,
        "weat_nat": 49.02,
        "weat_adv": 49.02,
        "eb_jdat": 64.78,
        "eb_jdat_sadajem": 66.12,
        "eb_jdat_released": 64.78,
        "eb_jdat_released_ce": 64.78,
        "eb_jdat_sadajem_released": 66.12,
        "eb_jdat_sadajem_released_ce": 66.12,
        "ablation_w001": 62.96,
        "ablation_w011": 64.69,
        "ablation_w1051": 64.09,
    }
    unreported = ("classifier", "pgd_at", "trades", "jeat_style", "eb_jdat_jem", "eb_jdat_ce", "ablation_w101")
    autoattack = {name: paper_numbers(full, name).get("autoattack") for name in full.experiments}
    assert autoattack == measured | dict.fromkeys(unreported)
    other = load(ROOT / "params/cifar100.yaml")
    assert paper_numbers(other, "eb_jdat_sadajem")["clean"] == 68.32
    assert paper_numbers(other, "eb_jdat") == {}


def test_a_spreadsheet_computes_no_text_and_numbers_stay_numbers() -> None:
    frame = pd.DataFrame({"text": ["=1", "+1", "-1", "@x", " =1", "\t=1", "＝1", "a=1", "a,b"], "n": [-1, 2, 3, 4, 5, 6, 7, 8, 9]})
    lines = list(csv.reader(spreadsheet(frame).splitlines()))
    assert [line[0] for line in lines[1:]] == ["'=1", "'+1", "'-1", "'@x", "' =1", "'\\t=1", "'＝1", "a=1", "a,b"]
    assert [line[1] for line in lines[1:4]] == ["-1", "2", "3"]
