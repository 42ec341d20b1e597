"""Tables from result files: the contract's columns, intervals against closed forms, and a page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from ebjdat import params
from ebjdat.files import write_json
from ebjdat.params import Profile
from ebjdat.report import page, tables
from ebjdat.report.figures import png, sample_grids, save
from ebjdat.report.tables import METRICS, aggregate, collect, wilson

from .conftest import ROOT

CONTRACT = (
    "experiment,method,seed,n_test,clean_acc,pgd20_acc,n_attack,autoattack_acc,frechet,frechet_extractor,n_samples,"
    "energy_gap_adversarial,energy_gap_generated,train_seconds,params_hash,data_hash,git_commit,collapse_epoch,recoveries"
)
DIVERGED = {"collapse_epoch": 2, "recoveries": 1, "events": ["epoch 2, step 5: seen; done"]}
CARD: dict[str, Any] = {
    "name": "digits",
    "data_hash": "d1",
    "image_shape": [1, 8, 8],
    "sizes": {"train": 10, "validation": 5, "test": 100},
}


def fill(profile: Profile, results: Path, autoattack: bool = True) -> None:
    """Result files as the stages write them, with values that say where they are from."""
    for i, (name, experiment) in enumerate(profile.experiments.items()):
        for seed in profile.seeds:
            folder = results / name / f"seed{seed}"
            correct = 90 - i - seed
            write_json(
                folder / "finetune.json",
                {
                    "train_seconds": 10.0 + seed,
                    "selected_epoch": 3,
                    "epochs": 4,
                    "method": experiment.method,
                    "git_commit": "abc",
                    "data_hash": "d1",
                    **(DIVERGED if name == "eb_jdat" else {"collapse_epoch": None, "recoveries": 0, "events": []}),
                },
            )
            attack = {
                "n_test": 100,
                "clean_acc": correct / 100,
                "clean_correct": correct,
                "pgd20_acc": 0.5,
                "pgd20_correct": 50,
                "n_attack": 20,
            }
            if autoattack:
                attack |= {"autoattack_acc": 0.45, "autoattack_correct": 9}
            write_json(folder / "attack.json", {**attack, "git_commit": "abc"})
            write_json(
                folder / "generate.json",
                {
                    "frechet": 12.5 + i,
                    "frechet_start": 9.0,
                    "frechet_buffer": None,
                    "frechet_extractor": "reference",
                    "n_samples": 200,
                    "n_buffer": 0,
                    "class_agreement": 0.9,
                    "git_commit": "abc",
                },
            )
            energies = {
                f"energy_{k}": float(i)
                for k in (
                    "clean",
                    "adversarial",
                    "generated",
                    "overlap_adversarial",
                    "overlap_generated",
                    "wasserstein_adversarial",
                    "wasserstein_generated",
                )
            }
            gaps = {
                "energy_gap_adversarial": 2.0 + i,
                "energy_gap_adversarial_se": 0.1,
                "energy_gap_generated": 1.0,
                "energy_gap_generated_se": 0.2,
            }
            write_json(folder / "energy.json", {**energies, **gaps, "n_energy_clean": 100, "n_energy_generated": 200, "git_commit": "abc"})
            write_json(folder / "reliability.json", {"ece": 0.02, "temperature": 1.5, "ood_missing": {}, "git_commit": "abc"})
            groups = ("clean", "adversarial", "generated")
            np.savez(folder / "energy.npz", **{p + g: np.random.default_rng(i).normal(size=50) for g in groups for p in ("", "joint_")})
            pd.DataFrame({"epoch": [1, 2], "validation_acc_clean": [0.5, 0.9], "energy_clean": [-1, -2]}).to_csv(
                folder / "finetune_curve.csv"
            )
            figure = sample_grids({"fresh": (np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 10)}, tuple("0123456789"), 2)
            save(figure, folder / "samples.png")
    for name in profile.pretraining:
        for seed in profile.seeds:
            write_json(results / "pretraining" / name / f"seed{seed}" / "pretrain.json", {"train_seconds": 5.0})


@pytest.fixture
def filled(profile: Profile, tmp_path: Path) -> Path:
    fill(profile, tmp_path)
    return tmp_path


def test_summary_is_the_contract(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    tables.write_summary(rows, filled / "summary.csv")
    lines = (filled / "summary.csv").read_text().splitlines()
    assert lines[0] == CONTRACT
    found = list(csv.DictReader(lines))
    assert [(r["experiment"], r["seed"]) for r in found] == [(e, str(s)) for e in profile.experiments for s in profile.seeds]
    first = found[0]
    assert float(first["clean_acc"]) == 0.9  # a fraction
    assert float(first["train_seconds"]) == 15.0  # with its pretraining
    assert first["params_hash"] == profile.params_hash("classifier", 0)
    assert (first["data_hash"], first["git_commit"], first["frechet_extractor"]) == ("d1", "abc", "reference")
    documented = (ROOT / "docs/results-format.md").read_text()
    assert all(f"`{column}`" in documented for column in CONTRACT.split(","))


def test_what_was_not_measured_is_empty(profile: Profile, tmp_path: Path) -> None:
    fill(profile, tmp_path, autoattack=False)
    rows = collect(profile, tmp_path, "d1")
    tables.write_summary(rows, tmp_path / "summary.csv")
    assert next(csv.DictReader((tmp_path / "summary.csv").open()))["autoattack_acc"] == ""
    table = aggregate(profile, rows)
    assert tables.cell(table.iloc[0], next(m for m in METRICS if m.name == "autoattack_acc")) == "–"
    page.write(profile, "digits", tmp_path, CARD, rows, table, tmp_path / "report.html")


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (7, 10), (10, 10), (450, 497)])
def test_wilson_by_its_formula(correct: int, n: int) -> None:
    """Wilson 1927: the roots of (p - f)^2 = z^2 p (1 - p) / n."""
    z, f = 1.959963984540054, correct / n
    centre, half = (f + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * (f * (1 - f) / n + z * z / (4 * n * n)) ** 0.5
    assert wilson(correct, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_one_seed_has_intervals_over_examples(profile: Profile, filled: Path) -> None:
    table = aggregate(profile, collect(profile, filled, "d1"))
    record = table.iloc[0]
    assert (record["clean_acc_low"], record["clean_acc_high"]) == pytest.approx(wilson(90, 100))
    assert record["energy_gap_adversarial_high"] == pytest.approx(2.0 + 1.959964 * 0.1, abs=1e-5)
    assert record["autoattack_acc_n"] == 20
    clean = next(m for m in METRICS if m.name == "clean_acc")
    assert tables.cell(record, clean) == "90.0 [82.6, 94.5]"
    assert tables.header(clean, table) == "clean %, n=100"
    fid = next(m for m in METRICS if m.name == "frechet")
    assert tables.header(fid, table) == "Fréchet (reference), n=200"
    assert tables.header(fid, table.assign(frechet_extractor="inception")) == "FID, n=200"


def test_several_seeds_have_spread_and_student_intervals(tmp_path: Path) -> None:
    profile = params.load(ROOT / "params/digits.yaml", ["seeds=[0, 1, 2]"])
    fill(profile, tmp_path)
    table = aggregate(profile, collect(profile, tmp_path, "d1"))
    record, values = table.iloc[0], [0.90, 0.89, 0.88]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert record["clean_acc"] == pytest.approx(0.89)
    assert record["clean_acc_sd"] == pytest.approx(0.01)
    assert (record["clean_acc_low"], record["clean_acc_high"]) == pytest.approx((expected.low, expected.high))
    assert tables.cell(record, METRICS[0]) == "89.0 ± 1.0"


def test_the_papers_numbers_stand_beside_only_where_asked(profile: Profile, filled: Path) -> None:
    assert not any(c.endswith("_paper") for c in aggregate(profile, collect(profile, filled, "d1")))
    asked = profile.model_copy(update={"report": params.ReportSettings(paper="cifar10")})
    table = aggregate(asked, collect(profile, filled, "d1")).set_index("experiment")
    assert table.loc["eb_jdat", "autoattack_acc_paper"] == pytest.approx(0.6478)
    assert "frechet_paper" not in table  # a distance under other features is no FID
    inception = [dataclasses.replace(r, metrics={**r.metrics, "frechet_extractor": "inception"}) for r in collect(profile, filled, "d1")]
    assert aggregate(asked, inception).set_index("experiment").loc["jempp", "frechet_paper"] == pytest.approx(37.12)
    assert np.isnan(table.loc["pgd_at", "clean_acc_paper"])
    assert "(paper 90.3)" in tables.cell(table.loc["eb_jdat"], METRICS[0])


def test_the_page_is_self_contained(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    table = aggregate(profile, rows)
    page.write(profile, "digits", filled, CARD, rows, table, filled / "report.html")
    html = (filled / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", html)
    assert "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert "<script" not in html
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", html)
    assert len(pictures) == 3 + len(profile.experiments)
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    for name in profile.experiments:
        assert name in html
    tables.write_markdown(table, rows, profile, CARD, filled / "table.md")
    assert "| eb_jdat | 87.0 [79.0, 92.2] |" in (filled / "table.md").read_text()


def test_divergences_are_in_the_summary_the_table_and_the_page(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    tables.write_summary(rows, filled / "summary.csv")
    found = {r["experiment"]: r for r in csv.DictReader((filled / "summary.csv").open())}
    assert (float(found["eb_jdat"]["collapse_epoch"]), found["eb_jdat"]["recoveries"]) == (2, "1")
    assert (found["pgd_at"]["collapse_epoch"], found["pgd_at"]["recoveries"]) == ("", "0")
    table = aggregate(profile, rows).set_index("experiment")
    assert tables.collapse_cell(table.loc["eb_jdat"]) == "1 of 1: epoch 2; 1 healed"
    assert tables.collapse_cell(table.loc["pgd_at"]) == "–"
    page.write(profile, "digits", filled, CARD, rows, aggregate(profile, rows), filled / "report.html")
    assert "<b>eb_jdat</b>, seed 0: epoch 2, step 5: seen; done" in (filled / "report.html").read_text()


def test_several_seeds_divergences_are_summed_and_a_pretrainings_are_listed(tmp_path: Path) -> None:
    profile = params.load(ROOT / "params/digits.yaml", ["seeds=[0, 1, 2]"])
    fill(profile, tmp_path)
    rows = collect(profile, tmp_path, "d1")
    more = {1: {"recoveries": 2, "collapse_epoch": 5}, 2: {"recoveries": 0, "collapse_epoch": None}}
    rows = [dataclasses.replace(r, metrics={**r.metrics, **more.get(r.seed, {})}) if r.experiment == "eb_jdat" else r for r in rows]
    record = aggregate(profile, rows).set_index("experiment").loc["eb_jdat"]
    assert tables.collapse_cell(record) == "2 of 3: epoch 2, 5; 3 healed"
    write_json(tmp_path / "pretraining/clean/seed0/pretrain.json", {"train_seconds": 5.0, "events": ["epoch 1, step 2: seen; done"]})
    events = {(r.experiment, r.seed): r.metrics["events"] for r in collect(profile, tmp_path, "d1")}
    assert events["pgd_at", 0] == ["pretraining clean, epoch 1, step 2: seen; done"]
    assert events["pgd_at", 1] == events["classifier", 0] == []


def test_averaged_weights_stand_beside_the_raw_ones(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    assert tables.averaged_weights(rows) == []
    ema = {"ema_clean_acc": 0.95, "ema_pgd20_acc": 0.55, "ema_frechet": 11.0}
    rows[0] = dataclasses.replace(rows[0], metrics={**rows[0].metrics, **ema})
    assert tables.averaged_weights(rows)[1:] == [["classifier", "0", "90.0 → 95.0", "50.0 → 55.0", "–", "12.50 → 11.00"]]
    table = aggregate(profile, rows)
    tables.write_markdown(table, rows, profile, CARD, filled / "table.md")
    assert "90.0 → 95.0" in (filled / "table.md").read_text()
    page.write(profile, "digits", filled, CARD, rows, table, filled / "report.html")
    assert "90.0 → 95.0" in (filled / "report.html").read_text()


def test_the_papers_numbers_are_those_of_the_base_and_the_ablation() -> None:
    """Against the table of the paper; a variant that the paper does not report has none."""
    full = params.load(ROOT / "params/cifar10.yaml")
    autoattack = {name: tables.paper_numbers(full, name).get("autoattack") for name in full.experiments}
    assert autoattack == {
        "classifier": None,
        "pgd_at": None,
        "trades": None,
        "jem": 4.28,
        "jempp": 41.06,
        "sadajem": 29.63,
        "eb_jdat": 64.78,
        "eb_jdat_sadajem": 66.12,
        "eb_jdat_jem": None,
        "eb_jdat_released": 64.78,
        "eb_jdat_sadajem_released": 66.12,
        "eb_jdat_ce": None,
        "ablation_w001": 62.96,
        "ablation_w011": 64.69,
        "ablation_w1051": 64.09,
        "ablation_w101": None,
    }
    other = params.load(ROOT / "params/cifar100.yaml")
    assert tables.paper_numbers(other, "eb_jdat_sadajem")["clean"] == 68.32
    assert tables.paper_numbers(other, "eb_jdat") == {}


def test_legends_say_what_an_experiment_is() -> None:
    full = params.load(ROOT / "params/digits-full.yaml")
    assert tables.differences(full, "classifier") == "optimizer.lr = 0.05"
    assert tables.differences(full, "eb_jdat_sadajem") == "on SADA-JEM, arXiv 2209.07959, paper form"
    assert tables.differences(full, "eb_jdat_released") == "on JEM++, arXiv 2109.09032, released form"
    assert "weights.w2 = 0" in tables.differences(full, "ablation_w101")


def test_names_cannot_inject_markup(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    card = {**CARD, "name": "<script>alert(1)</script>"}
    page.write(profile, "digits", filled, card, rows, aggregate(profile, rows), filled / "report.html")
    assert "<script" not in (filled / "report.html").read_text()


def test_grids_show_the_first_images_of_each_class_in_its_row() -> None:
    images = np.zeros((6, 1, 8, 8), np.uint8)
    images[:, 0] = np.array([10, 20, 30, 40, 50, 60])[:, None, None]
    figure = sample_grids({"p": (images, np.array([0, 1, 0, 1, 0, 1]))}, ("a", "b"), 2)
    canvas = figure.axes[0].get_images()[0].get_array()
    assert canvas.shape == (17, 17, 3)
    assert [canvas[0, 0, 0], canvas[0, 9, 0], canvas[9, 0, 0], canvas[9, 9, 0]] == [10, 30, 20, 40]
    assert png(figure).startswith(b"\x89PNG")


def test_reports_never_import_torch() -> None:
    code = "import sys, ebjdat.report.page, ebjdat.report.tables, ebjdat.report.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
