"""Tables from result files: the contract's columns, intervals against closed forms, and a page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from markupsafe import Markup
from typer.testing import CliRunner

from ebjdat import settings as params
from ebjdat.cli import app
from ebjdat.files import FileError, read_json, write_result
from ebjdat.report import claims, inline, page, tables
from ebjdat.report.figures import animate, sample_grids, save
from ebjdat.report.tables import METRICS, aggregate, collect, wilson
from ebjdat.settings import Profile

from .conftest import ROOT

CONTRACT = (
    "experiment,method,seed,n_test,clean_acc,pgd20_acc,n_attack,autoattack_acc,frechet,frechet_extractor,n_samples,"
    "energy_gap_adversarial,energy_gap_generated,train_seconds,params_hash,data_hash,git_commit,collapse_epoch,recoveries,"
    "released_pgd20_acc,released_autoattack_acc,checks_failed,ece"
)
DIVERGED = {"collapse_epoch": 2, "recoveries": 1, "events": ["epoch 2, step 5: seen; done"]}
CARD: dict[str, Any] = {
    "name": "digits",
    "data_hash": "d1",
    "image_shape": [1, 8, 8],
    "classes": list("0123456789"),
    "sizes": {"train": 10, "validation": 5, "test": 100},
}


RELIABILITY = {"ece": 0.02, "ece_scaled": 0.01, "temperature": 1.5, "nll": 0.3, "ood_missing": {"svhn": "not here"}, "git_commit": "abc"}
RELIABILITY |= {"ood_auroc_energy_noise": 0.9, "ood_auroc_energy_noise_low": 0.85, "ood_auroc_energy_noise_high": 0.95}
CHECK = {"protocol": None, "n": 20, "says": "figure"}


def attack_result(profile: Profile, correct: int, autoattack: bool) -> dict[str, Any]:
    """Of 100 examples and an ensemble on 20: PGD leaves 50 (released: 70), the ensemble 9 (released: 14)."""
    found: dict[str, Any] = {"git_commit": "abc", "checks_failed": 1, "sweep": [[0.0, correct / 100], [0.15, 0.5], [0.5, 0.0]]}
    found["checks"] = [
        {"name": "deterministic output", "passed": True, "value": 0.0, "limit": 1e-4, **CHECK},
        {"name": "black-box attack adds nothing", "passed": False, "value": 0.05, "limit": 0.01, **CHECK, "protocol": "standard"},
        {"name": "a transferred attack is weaker", "passed": None, "value": None, "limit": 0.0, **CHECK},
    ]
    for name, (pgd, ensemble) in {"": (50, 9), "released_": (70, 14), "standard_l2_": (60, 11)}.items():
        found |= {f"{name}n_test": 100, f"{name}clean_correct": correct, f"{name}clean_acc": correct / 100}
        found |= {f"{name}pgd20_correct": pgd, f"{name}pgd20_acc": pgd / 100, f"{name}n_attack": 20}
        if autoattack:
            found |= {f"{name}autoattack_correct": ensemble, f"{name}autoattack_acc": ensemble / 20}
    return found


MADE = {
    "pretrain": ["pretrain_curve.csv"],
    "finetune": ["finetune_curve.csv"],
    "attack": ["verdicts.parquet"],
    "generate": ["samples.png", "chains.gif"],
    "energy": ["energy.npz"],
    "reliability": ["reliability.png"],
}


def seal(path: Path) -> None:
    """A stage's result again, with what lies beside it as it is now."""
    write_result(path, read_json(path), [path.with_name(name) for name in MADE[path.stem]])


def write_verdicts(path: Path, profile: Profile, correct: int, autoattack: bool, pgd: int = 50, ensemble: int = 9) -> None:
    """The first ones stand."""
    rows = [{"weights": "ema", "protocol": "standard", "index": i, "clean": False, "pgd20": False, "autoattack": False} for i in range(100)]
    for name in profile.evaluation.attack.protocols:
        for i in range(100):
            clean = i < correct
            verdict = i < ensemble if autoattack and i < 20 else None
            row = {"weights": "raw", "protocol": name, "index": i, "label": i % 10, "prediction": i % 10 if clean else (i + 1) % 10}
            rows.append({**row, "clean": clean, "pgd20": i < pgd if clean else None, "autoattack": verdict, "worst": i < 9})
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_parquet(path)  # order is in `index`
    seal(path.with_name("attack.json"))


def fill(profile: Profile, results: Path, autoattack: bool = True) -> None:
    """Result files as the stages write them, with values that say where they are from."""
    pictures = results / "pictures"
    pictures.mkdir(parents=True)
    grid = sample_grids({"fresh": (np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 10)}, tuple("0123456789"), 2)
    save(grid, pictures / "samples.png")
    animate({"down E(x)": np.zeros((3, 10, 1, 8, 8), np.uint8)}, (0, 1, 2), 10, pictures / "chains.gif")
    for i, (name, experiment) in enumerate(profile.experiments.items()):
        for seed in profile.seeds:
            folder = results / name / f"seed{seed}"
            correct = 90 - i - seed
            write_result(
                folder / "finetune.json",
                {
                    "finetune_seconds": 10.0 + seed,
                    "selected_epoch": 3,
                    "epochs": 4,
                    "method": experiment.method,
                    "git_commit": "abc",
                    "data_hash": "d1",
                    **(DIVERGED if name == "eb_jdat" else {"collapse_epoch": None, "recoveries": 0, "events": []}),
                },
            )
            write_result(folder / "attack.json", attack_result(profile, correct, autoattack))
            write_verdicts(folder / "verdicts.parquet", profile, correct, autoattack)
            generated = {"frechet": 12.5 + i, "frechet_start": 9.0, "frechet_buffer": None, "frechet_extractor": "reference"}
            generated |= {
                "kid": 0.001,
                "kid_std": 0.0005,
                "precision": 0.5,
                "recall": 0.25,
                "reference_score": 5.0,
                "reference_score_std": 0.1,
            }
            generated |= {"released_frechet": 7.25, "released_n_samples": 90, "n_samples": 200, "n_buffer": 0, "class_agreement": 0.9}
            write_result(folder / "generate.json", {**generated, "git_commit": "abc"})
            shutil.copy(pictures / "chains.gif", folder)
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
            write_result(
                folder / "energy.json", {**energies, **gaps, "n_energy_clean": 100, "n_energy_generated": 200, "git_commit": "abc"}
            )
            write_result(folder / "reliability.json", RELIABILITY)
            groups = ("clean", "adversarial", "generated")
            np.savez(folder / "energy.npz", **{p + g: np.random.default_rng(i).normal(size=50) for g in groups for p in ("", "joint_")})
            pd.DataFrame({"epoch": [1, 2], "validation_clean_acc": [0.5, 0.9], "energy_clean": [-1, -2]}).to_csv(
                folder / "finetune_curve.csv"
            )
            shutil.copy(pictures / "samples.png", folder)
            shutil.copy(pictures / "samples.png", folder / "reliability.png")
    for name in profile.pretraining:
        for seed in profile.seeds:
            write_result(results / "pretraining" / name / f"seed{seed}" / "pretrain.json", {"pretrain_seconds": 5.0})
            (results / "pretraining" / name / f"seed{seed}/pretrain_curve.csv").write_text("epoch\n1\n")
    for path in results.rglob("seed*/*.json"):
        seal(path)


def write_page(profile: Profile, results: Path, rows: list[tables.Row], card: dict[str, Any] = CARD, overrides: Any = ()) -> str:
    findings = claims.judge(claims.Evidence(profile, rows, results))
    page.write(profile, "digits", results, card, rows, aggregate(profile, rows), findings, results / "report.html", overrides)
    return (results / "report.html").read_text()


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
    listed = documented.split("```")[1]
    assert re.split(r",\s*", listed.strip()) == CONTRACT.split(",")


def test_headline_metrics_are_means_over_seeds_of_what_was_measured(tmp_path: Path) -> None:
    rows = [
        tables.Row("a", "m", seed, "", "", "", {"clean_acc": value, "ece": ece, "autoattack_acc": None, "n_test": 5})
        for seed, value, ece in ((0, 0.5, 0.1), (1, 1.0, None))
    ]
    assert tables.headline(rows) == {"a": {"clean_acc": 0.75}}
    assert set(tables.HEADLINE) <= set(tables.SUMMARY_COLUMNS)


def test_what_was_not_measured_is_empty(profile: Profile, tmp_path: Path) -> None:
    fill(profile, tmp_path, autoattack=False)
    rows = collect(profile, tmp_path, "d1")
    tables.write_summary(rows, tmp_path / "summary.csv")
    assert next(csv.DictReader((tmp_path / "summary.csv").open()))["autoattack_acc"] == ""
    table = aggregate(profile, rows)
    assert tables.cell(table.iloc[0], next(m for m in METRICS if m.name == "autoattack_acc")) == "–"
    write_page(profile, tmp_path, rows)


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
    html = write_page(profile, filled, rows)
    assert set(re.findall(r"(?:src|href)=[\"'](?!data:|#)([^\"']*)", html)) == {"audit.html", "audit.html#checks", "audit.html#pairs"}
    assert "http" not in re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", html).replace("http-equiv", "")
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", html)]
    assert len(pictures) == 3 * len(profile.experiments)
    assert all(p[:4] in (b"RIFF", b"GIF8", b"\x89PNG") for p in pictures)
    tables.write_markdown(aggregate(profile, rows), rows, profile, CARD, filled / "table.md")
    assert "| eb_jdat | 87.0 [79.0, 92.2] |" in (filled / "table.md").read_text()


def test_only_the_pages_own_script_may_run(profile: Profile, filled: Path) -> None:
    html = write_page(profile, filled, collect(profile, filled, "d1"))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_every_experiment_has_a_section_with_its_own(profile: Profile, filled: Path) -> None:
    html = write_page(profile, filled, collect(profile, filled, "d1"))
    for i, name in enumerate(profile.experiments):
        section = html[html.index(f'<details class="experiment" id="experiment-{name}"') :].split("\n</details>")[0]
        assert section.count("data:image") == 3
        assert section.count("<svg") == 2
        assert f"fresh chains {12.5 + i:.2f} (n = 200)" in section
        assert "black-box attack adds nothing (standard): 0.05, limit 0.01" in section
    row = html[html.index("<tbody>") :].split("</tr>")[0]
    assert "✗ 1 check failed" in row  # at its name in the summary
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_a_best_value_is_marked_only_as_far_as_intervals_tell() -> None:
    accuracy, distance = (next(m for m in METRICS if m.name == name) for name in ("clean_acc", "energy_gap_generated"))

    def marks(metric: tables.Metric, *rows: tuple[float, float, float]) -> list[str]:
        columns = [metric.name, f"{metric.name}_low", f"{metric.name}_high"]
        return page.best_marks(pd.DataFrame(rows, columns=columns), metric)

    assert marks(accuracy, (0.5, 0.4, 0.6), (0.9, 0.8, 0.95), (0.7, 0.6, 0.75)) == ["", "best", ""]
    assert marks(distance, (0.5, 0.4, 0.6), (0.9, 0.8, 0.95)) == ["best", ""]
    assert marks(accuracy, (0.5, 0.4, 0.6), (0.9, 0.8, 0.95), (0.85, 0.7, 0.9)) == ["", "tied", "tied"]
    assert marks(accuracy, (0.88, 0.8, 0.95), (0.9, 0.8, 0.95)) == ["", ""]  # nothing is told apart
    assert marks(accuracy, (0.5, np.nan, np.nan), (0.9, 0.8, 0.95)) == ["", ""]  # how sure the other is, is unknown
    assert marks(accuracy, (np.nan, np.nan, np.nan), (0.9, 0.8, 0.95), (0.5, 0.4, 0.6)) == ["", "best", ""]
    assert page.best_marks(pd.DataFrame({"clean_acc": [0.1, 0.9]}), accuracy) == ["", ""]


def test_commands_say_what_made_a_row_and_what_is_not_known(profile: Profile, filled: Path) -> None:
    row, *_ = collect(profile, filled, "d1")
    command, notes = page.reproduce("digits+ci", filled, row, ["params/overrides/ci.yaml", "data.path=my images"])
    checkout, run = command.splitlines()
    assert (checkout, notes) == ("git checkout abc", "")
    words = shlex.split(run)
    assert words[:4] == ["snakemake", "--cores", "all", "--config"]
    assert words[4:7] == ["profile=digits", 'overrides=["params/overrides/ci.yaml", "data.path=my images"]', "--"]
    assert words[7:] == [f"results/digits+ci/classifier/seed0/{stage}.json" for stage in tables.STAGES]

    def commit(stage: str, name: str) -> None:
        path = filled / f"classifier/seed0/{stage}.json"
        write_result(path, {**read_json(path), "git_commit": name})

    commit("attack", "def")
    command, notes = page.reproduce("digits", filled, row, [])
    assert command.startswith("git checkout def\n")
    assert "finetune at abc, attack at def" in notes
    commit("attack", "abc-dirty")
    command, notes = page.reproduce("digits", filled, row, [])
    assert command.startswith("git checkout abc\n")
    assert "not committed" in notes
    for stage in tables.STAGES:
        commit(stage, "unknown")
    command, notes = page.reproduce("digits", filled, dataclasses.replace(row, git_commit="unknown"), [])
    assert command.startswith("snakemake")
    assert "commit is unknown" in notes


def test_settings_are_shown_where_experiments_differ(profile: Profile) -> None:
    settings = page.differing_settings(profile)
    assert (settings["jempp"]["training.optimizer.lr"], settings["eb_jdat"]["training.optimizer.lr"]) == (0.1, 0.3)
    assert "training.batch_size" not in settings["eb_jdat"]
    assert not any(key.startswith("evaluation") for key in settings["eb_jdat"])


def test_figures_take_the_colours_of_the_page(profile: Profile, filled: Path) -> None:
    html = write_page(profile, filled, collect(profile, filled, "d1"))
    for drawn in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawn.replace("#ffffff", ""))  # markers' edges
        assert 'aria-label="' in drawn.split(">")[0]


def test_divergences_are_in_the_summary_the_table_and_the_page(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    tables.write_summary(rows, filled / "summary.csv")
    found = {r["experiment"]: r for r in csv.DictReader((filled / "summary.csv").open())}
    assert (float(found["eb_jdat"]["collapse_epoch"]), found["eb_jdat"]["recoveries"]) == (2, "1")
    assert (found["pgd_at"]["collapse_epoch"], found["pgd_at"]["recoveries"]) == ("", "0")
    table = aggregate(profile, rows).set_index("experiment")
    assert tables.collapse_cell(table.loc["eb_jdat"]) == "1 of 1: epoch 2; 1 healed"
    assert tables.collapse_cell(table.loc["pgd_at"]) == "–"
    section = write_page(profile, filled, rows).split('id="experiment-eb_jdat"')[1].split("\n</details>")[0]
    assert "diverged, 1 of 1: epoch 2; 1 healed" in section
    assert "seed 0: epoch 2, step 5: seen; done" in section


def test_several_seeds_divergences_are_summed_and_a_pretrainings_are_listed(tmp_path: Path) -> None:
    profile = params.load(ROOT / "params/digits.yaml", ["seeds=[0, 1, 2]"])
    fill(profile, tmp_path)
    rows = collect(profile, tmp_path, "d1")
    more = {1: {"recoveries": 2, "collapse_epoch": 5}, 2: {"recoveries": 0, "collapse_epoch": None}}
    rows = [dataclasses.replace(r, metrics={**r.metrics, **more.get(r.seed, {})}) if r.experiment == "eb_jdat" else r for r in rows]
    record = aggregate(profile, rows).set_index("experiment").loc["eb_jdat"]
    assert tables.collapse_cell(record) == "2 of 3: epoch 2, 5; 3 healed"
    path = tmp_path / "pretraining/clean/seed0/pretrain.json"
    write_result(path, {**read_json(path), "events": ["epoch 1, step 2: seen; done"]})
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
    write_page(profile, filled, rows)
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
        "eb_jdat_released_ce": 64.78,
        "eb_jdat_sadajem_released": 66.12,
        "eb_jdat_sadajem_released_ce": 66.12,
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


def test_protocols_stand_side_by_side_with_their_radii_and_differences(profile: Profile, filled: Path) -> None:
    heads, first, *_ = tables.side_by_side(profile, collect(profile, filled, "d1"))
    cells = dict(zip(heads, first, strict=True))
    assert cells["standard: PGD-20 %, radius L∞ 0.15"] == "50.0 [40.4, 59.6]"
    assert cells["released: PGD-20 %, radius L∞ 0.075"] == "70.0 [60.4, 78.1]"
    assert cells["released − standard, PGD"] == "+20.0"
    assert cells["standard: AutoAttack standard %, radius L∞ 0.15, n=8"].startswith("45.0 [")
    assert cells["released: ensemble %, radius L∞ 0.075, n=8"].startswith("70.0 [")
    assert cells["released − standard, ensemble"] == "+25.0"
    assert not any("standard_l2 − standard" in head for head in heads)  # other norms are no difference
    cifar = params.load(ROOT / "params/cifar10.yaml")
    assert [tables.effective_radius(cifar, name) for name in ("standard", "released", "standard_l2")] == ["L∞ 8/255", "L∞ 4/255", "L2 0.5"]


def test_pairs_of_models_are_compared_on_the_same_examples(profile: Profile, filled: Path) -> None:
    write_verdicts(filled / "pgd_at/seed0/verdicts.parquet", profile, 90, True, pgd=80, ensemble=20)
    pairs = {(p["a"], p["b"]): p for p in tables.pairwise(profile, filled, 0, "pgd20")}
    assert len(pairs) == 6
    found = pairs["classifier", "pgd_at"]
    assert (found["only_a"], found["only_b"], found["n"]) == (0, 30, 100)
    assert found["p"] == pytest.approx(2 * 0.5**30)
    assert pairs["classifier", "jempp"]["p"] == 1
    smallest = sorted(p["p"] for p in pairs.values())
    holm = [min(1, max(smallest[j] * (6 - j) for j in range(i + 1))) for i in range(6)]
    assert sorted(p["p_holm"] for p in pairs.values()) == pytest.approx(holm)
    pairs = {(p["a"], p["b"]): p for p in tables.pairwise(profile, filled, 0, "autoattack")}
    assert (pairs["classifier", "pgd_at"]["only_b"], pairs["classifier", "pgd_at"]["n"]) == (11, 20)


def test_the_audit_page_shows_claims_checks_and_pairs(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    findings = claims.judge(claims.Evidence(profile, rows, filled))
    page.write_audit(profile, "digits", filled, CARD, rows, findings, filled / "audit.html")
    html = (filled / "audit.html").read_text()
    assert set(re.findall(r"(?:src|href)=[\"'](?!data:|#)([^\"']*)", html)) == {"report.html"}
    assert html.count("<script") == 1
    assert html.count('<span class="fail">FAIL</span>') == len(profile.experiments)
    assert html.count("0.05 &gt; 0.01") + html.count("0.05 > 0.01") == len(profile.experiments)
    assert html.count("not asked") == len(profile.experiments)
    assert "McNemar" in html
    for finding in findings:
        assert f'<span class="{finding.verdict}">{finding.verdict}</span>' in html
    tables.write_audit_markdown(findings, tables.side_by_side(profile, rows), tables.checks_of(rows), filled / "audit.md")
    text = (filled / "audit.md").read_text()
    assert "- eb_jdat, seed 0: black-box attack adds nothing [standard]: 0.05, limit 0.01 (figure)" in text
    assert all(finding.claim in text for finding in findings)
    for page_text in (html, text):
        assert "jkcjkc/EB-JDAT at 327ea16 (May 2025)" in page_text
        assert "a later release may differ" in page_text


def judged(profile: Profile, results: Path, claim: Any, **metrics: dict[str, Any]) -> claims.Finding:
    """A claim's finding, with these metrics of some experiments in place of those of `fill`."""
    rows = [dataclasses.replace(r, metrics={**r.metrics, **metrics.get(r.experiment, {})}) for r in collect(profile, results, "d1")]
    found = claim(claims.Evidence(profile, rows, results))
    assert found is not None, "no experiment is about this claim"
    return found


def verdict(profile: Profile, results: Path, claim: Any, **metrics: dict[str, Any]) -> str:
    return judged(profile, results, claim, **metrics).verdict


def test_claims_about_robustness_are_judged_example_by_example(profile: Profile, filled: Path) -> None:
    assert verdict(profile, filled, claims.beats_adversarial_training) == "open"
    write_verdicts(filled / "eb_jdat/seed0/verdicts.parquet", profile, 90, True, ensemble=18)
    found = judged(profile, filled, claims.beats_adversarial_training)
    assert found.verdict == "holds"
    assert "only eb_jdat right 9, only pgd_at 0, p = 0.0039" in found.why
    write_verdicts(filled / "eb_jdat/seed0/verdicts.parquet", profile, 90, True, ensemble=1)
    assert verdict(profile, filled, claims.beats_adversarial_training) == "fails"
    write_verdicts(filled / "eb_jdat/seed0/verdicts.parquet", profile, 99, True)
    assert verdict(profile, filled, claims.keeps_accuracy) == "holds"
    found = judged(profile, filled, claims.stated_protocol)
    assert found.verdict == "fails"
    assert "+25.0 points" in found.why


def test_the_papers_number_is_at_stake_on_its_own_data_alone(profile: Profile, filled: Path) -> None:
    assert verdict(profile, filled, claims.stated_robustness) == "open"
    asked = profile.model_copy(update={"report": params.ReportSettings(paper="cifar10")})
    assert verdict(asked, filled, claims.stated_robustness) == "open"  # another network, another radius
    cifar = params.load(ROOT / "params/cifar10.yaml", ["evaluation.attack.protocols.standard.n=20"])
    fill(cifar, filled / "cifar")

    def of(correct: int, n: int = 20, profile: Profile = cifar) -> str:
        numbers = {"autoattack_acc": correct / n, "autoattack_correct": correct, "n_attack": n}
        return verdict(profile, filled / "cifar", claims.stated_robustness, eb_jdat=numbers)

    assert of(13) == "open"  # 65 % of 20: 43 to 82 %
    assert of(700, 1000) == "holds"
    assert of(600, 1000) == "fails"
    assert of(700, 1000, params.load(ROOT / "params/cifar10.yaml", ["model.width=1"])) == "open"
    assert of(700, 1000, params.load(ROOT / "params/cifar10.yaml", ["model.variant=wrn"])) == "open"
    assert of(700, 1000, params.load(ROOT / "params/cifar10.yaml", ["evaluation.attack.protocols.standard.eps=4/255"])) == "open"
    unmeasured = {"autoattack_acc": None, "pgd20_acc": 0.9}
    assert judged(cifar, filled / "cifar", claims.stated_robustness, eb_jdat=unmeasured).why == "not measured"


def test_claims_about_energies_are_judged_by_their_intervals(profile: Profile, filled: Path) -> None:
    first = claims.training_closes_first_gap
    assert verdict(profile, filled, first) == "fails"  # classifier 2.0, pgd_at 3.0, each +- 0.2
    assert verdict(profile, filled, first, pgd_at={"energy_gap_adversarial": 1.0}) == "holds"
    assert verdict(profile, filled, first, pgd_at={"energy_gap_adversarial": 1.9}) == "open"
    assert verdict(profile, filled, claims.closes_first_gap, eb_jdat={"energy_gap_adversarial": 0.5}) == "holds"
    assert "one seed: of these two networks" in judged(profile, filled, first).why
    assert verdict(profile, filled, claims.closes_second_gap) == "open"
    assert verdict(profile, filled, claims.jem_closes_second_gap, jempp={"energy_gap_generated": 0.1}) == "holds"


def test_claims_about_samples_know_what_a_distance_cannot_say(profile: Profile, filled: Path) -> None:
    assert "starts alone reach 9.00" in judged(profile, filled, claims.generates_like_its_jem).why
    assert "one seed" in judged(profile, filled, claims.generates_like_its_jem, eb_jdat={"frechet": 3.0}).why
    found = judged(profile, filled, claims.fid_is_of_samples)
    assert "7.25 as released (n = 90), 15.50 of fresh chains (n = 200)" in found.measured
    with pytest.raises(AssertionError, match="no experiment is about this claim"):
        judged(profile, filled, claims.fid_is_of_samples, eb_jdat={"released_frechet": None})


def test_claims_about_collapse_need_the_ablation_and_three_seeds(profile: Profile, filled: Path, tmp_path: Path) -> None:
    assert verdict(profile, filled, claims.alignment_prevents_collapse) == "open"
    assert "was not measured" in judged(profile, filled, claims.code_is_the_paper).measured
    assert verdict(profile, filled, claims.more_steps_collapse) == "open"
    full = params.load(ROOT / "params/digits-full.yaml")
    fill(full, tmp_path / "full")
    never, always = {"collapse_epoch": None}, {"collapse_epoch": 3}
    claim = claims.alignment_prevents_collapse
    assert "nothing to prevent" in judged(full, tmp_path / "full", claim, eb_jdat=never).why
    three = judged(full, tmp_path / "full", claim, eb_jdat=never, ablation_w101=always)
    assert (three.verdict, three.why) == ("open", "Fisher's exact p = 0.1")  # 3 of 3 against 0 of 3
    five = params.load(ROOT / "params/digits-full.yaml", ["seeds=[0, 1, 2, 3, 4]"])
    fill(five, tmp_path / "five")
    assert verdict(five, tmp_path / "five", claim, eb_jdat=never, ablation_w101=always) == "holds"
    assert verdict(five, tmp_path / "five", claim, eb_jdat=always, ablation_w101=never) == "fails"
    assert verdict(full, tmp_path / "full", claim, eb_jdat=always, ablation_w101=always) == "open"
    for seed in full.seeds:
        write_verdicts(tmp_path / f"full/eb_jdat/seed{seed}/verdicts.parquet", full, 90, True, ensemble=18 - seed)
    found = judged(full, tmp_path / "full", claims.code_is_the_paper)
    assert found.verdict == "fails"
    assert "released form, its default lines (eb_jdat_released) 45.0" in found.measured
    assert "with its commented-out cross-entropy step (eb_jdat_released_ce) 45.0" in found.measured
    assert found.why.count("difference over 3 seeds") == 2
    assert "jkcjkc/EB-JDAT at 327ea16" in found.why
    one = params.load(ROOT / "params/digits-full.yaml", ["seeds=[0]"])
    assert verdict(one, tmp_path / "full", claim, eb_jdat=never, ablation_w101=always) == "open"


def test_more_steps_are_judged_by_enough_runs(tmp_path: Path) -> None:
    profile = params.load(ROOT / "params/digits.yaml", ["seeds=[0, 1, 2]", "experiments.eb_jdat.training.adversary.steps=7"])
    fill(profile, tmp_path)
    claim, collapsed, fine = claims.more_steps_collapse, {"collapse_epoch": 2}, {"collapse_epoch": None}
    assert verdict(profile, tmp_path, claim, eb_jdat=collapsed) == "holds"
    assert verdict(profile, tmp_path, claim, eb_jdat=fine) == "fails"
    one = params.load(ROOT / "params/digits.yaml", ["experiments.eb_jdat.training.adversary.steps=7"])
    assert verdict(one, tmp_path, claim, eb_jdat=fine) == "open"


def test_several_seeds_are_judged_by_their_differences(tmp_path: Path) -> None:
    """t intervals over three seeds: of accuracies example by example, and of distances against the paper's own margin."""
    profile = params.load(ROOT / "params/digits.yaml", ["seeds=[0, 1, 2]"])
    fill(profile, tmp_path)
    for seed, stands in enumerate((10, 11, 20)):  # against 9: +1, +2, +11 of 20
        write_verdicts(tmp_path / f"eb_jdat/seed{seed}/verdicts.parquet", profile, 90, True, ensemble=stands)
    assert verdict(profile, tmp_path, claims.beats_adversarial_training) == "open"
    for seed, stands in enumerate((18, 19, 20)):
        write_verdicts(tmp_path / f"eb_jdat/seed{seed}/verdicts.parquet", profile, 90, True, ensemble=stands)
    found = judged(profile, tmp_path, claims.beats_adversarial_training)
    low, high = scipy.stats.ttest_1samp([9 / 20, 10 / 20, 11 / 20], 0).confidence_interval(0.95)
    assert found.verdict == "holds"
    assert f"[{100 * low:+.1f}, {100 * high:+.1f}]" in found.why

    def generation(mine: tuple[float, ...], starts: float = 100.0) -> str:
        rows = collect(profile, tmp_path, "d1")
        values = {"eb_jdat": mine, "jempp": (10.0, 10.0, 10.0)}
        rows = [
            dataclasses.replace(r, metrics={**r.metrics, "frechet": values[r.experiment][r.seed], "frechet_start": starts})
            if r.experiment in values
            else r
            for r in rows
        ]
        found = claims.generates_like_its_jem(claims.Evidence(profile, rows, tmp_path))
        assert found is not None
        return found.verdict

    assert generation((10.1, 10.2, 10.15)) == "holds"  # within 7 % of 10
    assert generation((9.0, 9.1, 9.05)) == "holds"
    assert generation((12.0, 12.1, 12.05)) == "fails"
    assert generation((5.0, 10.0, 20.0)) == "open"
    assert generation((10.1, 10.2, 10.15), starts=9.0) == "open"  # neither improves on its starts


def test_the_strongest_baseline_is_the_one_to_beat(tmp_path: Path) -> None:
    full = params.load(ROOT / "params/digits-full.yaml", ["seeds=[0]"])
    fill(full, tmp_path)
    found = judged(full, tmp_path, claims.beats_adversarial_training, trades={"autoattack_acc": 0.9, "autoattack_correct": 18})
    assert "trades 90.0" in found.measured
    only = params.load(ROOT / "params/digits.yaml", ["experiments.eb_jdat.form=released"])
    assert claims.Evidence(only, (), tmp_path).ours is None


def test_every_claim_of_the_full_profile_is_judged() -> None:
    """EB-JDAT's experiments are found by what they are, not by their names."""
    for name in ("digits-full", "cifar10"):
        evidence = claims.Evidence(params.load(ROOT / f"params/{name}.yaml"), (), Path())
        assert (evidence.ours, evidence.jem) == ("eb_jdat", "jempp")
        assert evidence.find("eb_jdat", "released") == "eb_jdat_released"
        assert evidence.find("eb_jdat", "released_ce") == "eb_jdat_released_ce"
        assert evidence.find("eb_jdat", "paper", w2=0.0) == "ablation_w101"
        assert evidence.trained_robust == ["pgd_at", "trades"]


def test_the_page_says_what_the_data_card_warns_of(profile: Profile, filled: Path) -> None:
    rows = tables.collect(profile, filled, "d1")
    found = {"duplicates": {"test_in_train": 40, "conflicting_labels": 0}, "notes": ["the folder '<b>' is the train split"]}
    warning = "test images that are training images too, pixel by pixel: 40"
    html = write_page(profile, filled, rows, {**CARD, **found, "warnings": [warning]})
    data = html[html.index('<details id="data">') : html.index("</details>", html.index('<details id="data">'))]
    assert '<span class="flag">1 warning</span>' in data
    assert f'<li class="fail">{warning}</li>' in data
    assert "<dt><code>test_in_train</code></dt><dd>40</dd>" in data
    assert "<b>' is" not in data
    clean = write_page(profile, filled, rows, {**CARD, **found, "warnings": []})
    assert "no warnings" in clean[clean.index('<details id="data">') :][:200]
    assert '<details id="data">' not in write_page(profile, filled, rows)  # a card of an earlier version


def test_names_cannot_inject_markup(profile: Profile, filled: Path) -> None:
    rows = collect(profile, filled, "d1")
    card = {**CARD, "name": "<script>alert(1)</script>"}
    html = write_page(profile, filled, rows, card)
    assert html.count("<script") == 1
    assert "<script>alert" not in html


def test_grids_show_the_first_images_of_each_class_in_its_row(tmp_path: Path) -> None:
    images = np.zeros((6, 1, 8, 8), np.uint8)
    images[:, 0] = np.array([10, 20, 30, 40, 50, 60])[:, None, None]
    figure = sample_grids({"p": (images, np.array([0, 1, 0, 1, 0, 1]))}, ("a", "b"), 2)
    canvas = figure.axes[0].get_images()[0].get_array()
    assert canvas.shape == (17, 17, 3)
    assert [canvas[0, 0, 0], canvas[0, 9, 0], canvas[9, 0, 0], canvas[9, 9, 0]] == [10, 30, 20, 40]
    save(figure, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_reports_never_import_torch() -> None:
    code = "import sys, ebjdat.report.page, ebjdat.report.tables, ebjdat.report.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def change(path: Path, **values: Any) -> None:
    """Values of a result file; None leaves the name out."""
    found = {**read_json(path), **values}
    write_result(path, {name: value for name, value in found.items() if value is not None or name not in values})


@pytest.mark.parametrize(
    ("file", "values", "why"),
    [
        ("finetune", {"finetune_seconds": "10"}, "finetune_seconds is '10', where its unit is seconds"),
        ("finetune", {"git_commit": None}, "without git_commit"),
        ("finetune", {"events": "none"}, "events is 'none', where its unit is list of text"),
        ("finetune", {"events": [1]}, r"events\.0: Input should be a valid string"),
        ("attack", {"clean_acc": [0.5]}, r"clean_acc is \[0.5\], where its unit is fraction"),
        ("attack", {"released_pgd20_acc": "x" * 9999}, r"released_pgd20_acc is 'x+… "),
        ("attack", {"sweep": []}, "sweep: List should have at least 1 item"),
        ("attack", {"sweep": [[0.1]]}, r"sweep\.0"),
        ("attack", {"sweep": [["a", "b"]]}, r"sweep\.0\.0"),
        ("attack", {"checks": [{"name": "x"}]}, r"checks\.0\.protocol: Field required"),
        ("attack", {"n_test": True}, "n_test is True, where its unit is count"),
        ("generate", {"frechet_extractor": 3}, "frechet_extractor is 3"),
        ("energy", {"energy_gap_generated": {}}, "energy_gap_generated is {}"),
        ("energy", {"energy_clean": None}, "without energy_clean"),
        ("reliability", {"ood_missing": ["svhn"]}, "ood_missing is"),
        ("reliability", {f"name{i}": i for i in range(10_001)}, "names"),
    ],
)
def test_a_result_that_is_not_what_its_name_says_names_its_file(
    profile: Profile, filled: Path, file: str, values: dict[str, Any], why: str
) -> None:
    path = filled / f"eb_jdat/seed0/{file}.json"
    change(path, **values)
    with pytest.raises(FileError, match=why) as caught:
        collect(profile, filled, "d1")
    told = str(caught.value)
    assert told.startswith(f"{path}: ")
    assert told.endswith("; delete it and rerun its stage")
    assert len(told) < 600


def test_no_changed_bit_of_a_result_reaches_the_report(profile: Profile, filled: Path) -> None:
    path = filled / "eb_jdat/seed0/attack.json"
    whole, rows = path.read_bytes(), collect(profile, filled, "d1")
    number = whole.index(b'"clean_acc": 0.') + len(b'"clean_acc": 0.')
    bits = [(number, 0), *((i * 97 % len(whole), i % 8) for i in range(200))]
    told = []
    for place, bit in bits:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert collect(profile, filled, "d1") == rows  # a blank that became another
        except FileError as error:
            told.append(str(error))
    assert len(told) > 150
    assert all(text.startswith(f"{path}: ") for text in told)
    path.write_bytes(whole.replace(b'"digest"', b'"tsegid"'))
    with pytest.raises(FileError, match="no digest, so from an earlier version"):
        collect(profile, filled, "d1")
    path.write_bytes(whole[:number] + b"1" + whole[number + 1 :])
    with pytest.raises(FileError, match="changed since it was written"):
        collect(profile, filled, "d1")


@pytest.mark.parametrize("name", [name for stage, names in MADE.items() if stage != "pretrain" for name in names])
def test_what_changed_beside_a_result_is_refused(profile: Profile, filled: Path, name: str) -> None:
    """A curve, a picture, verdicts or energies with one bit flipped, which their formats may well not notice."""
    path = filled / "eb_jdat/seed0" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    mend = rf"restore it with `dvc checkout {path}`, or delete it and rerun its stage"
    told = rf"^{path}: changed since its stage wrote it \(according to \w+\.json\); {mend}$"
    with pytest.raises(FileError, match=told):
        collect(profile, filled, "d1")
    path.write_bytes(whole)
    rows = collect(profile, filled, "d1")
    assert "files" not in rows[0].metrics
    path.unlink()
    assert collect(profile, filled, "d1") == rows  # who reads it says that it is not there
    os.mkfifo(path)
    with pytest.raises(FileError, match=rf"^{path}: not a regular file; delete it and rerun its stage$"):
        collect(profile, filled, "d1")


@pytest.mark.parametrize(("files", "told"), [({}, "without files, so of an earlier version"), ([], "files is list; names with")])
def test_a_result_that_does_not_tell_its_files_is_refused(profile: Profile, filled: Path, files: Any, told: str) -> None:
    path = filled / "eb_jdat/seed0/energy.json"
    write_result(path, {**read_json(path), "files": files})
    with pytest.raises(FileError, match=rf"energy\.json: .*{told}"):
        collect(profile, filled, "d1")
    found = {name: value for name, value in read_json(path).items() if name != "files"}
    write_result(path, found)
    with pytest.raises(FileError, match=r"energy\.json: .*without files, so of an earlier version"):
        collect(profile, filled, "d1")


def test_a_result_that_is_missing_names_its_file(profile: Profile, filled: Path) -> None:
    (filled / "pretraining/clean/seed0/pretrain.json").unlink()
    with pytest.raises(FileError, match=r"pretrain\.json: no such file; run the stage that makes it first"):
        collect(profile, filled, "d1")
    write_result(filled / "card.json", {**CARD, "sizes": [1]})
    with pytest.raises(FileError, match=r"card\.json: .*sizes"):
        tables.read_card(filled / "card.json")


def test_what_was_not_finite_is_not_shown_as_a_number(profile: Profile, filled: Path) -> None:
    """As results of a network that diverged have it: null in JSON, NaN among the energies."""
    for stage, names in {
        "energy": ("energy_clean", "energy_gap_adversarial", "energy_gap_adversarial_se"),
        "generate": ("frechet", "frechet_start", "class_agreement"),
        "reliability": ("ece", "temperature"),
    }.items():
        path = filled / f"eb_jdat/seed0/{stage}.json"
        write_result(path, {**read_json(path), **dict.fromkeys(names)})
    with np.load(filled / "eb_jdat/seed0/energy.npz") as file:
        arrays = dict(file)
    arrays |= {"clean": np.full(50, np.nan), "generated": np.where(np.arange(50) % 2, np.inf, arrays["generated"])}
    np.savez(filled / "eb_jdat/seed0/energy.npz", **arrays)
    seal(filled / "eb_jdat/seed0/energy.json")
    rows = collect(profile, filled, "d1")
    html = write_page(profile, filled, rows)
    assert "fresh chains – (n = 200), their starts alone –" in html
    assert "<td>–</td>" in html


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("finetune_curve.csv", b""),
        ("finetune_curve.csv", b"\x00\xff\xfe"),
        ("finetune_curve.csv", b"epoch,loss\n1,2\n3,4,5,6\n"),
        ("finetune_curve.csv", b"loss\n1\n"),
        ("finetune_curve.csv", b"epoch,energy_clean\n1,high\n"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FileError, match=rf"{file}: damaged or invalid \(.*\); delete it and rerun its stage$"):
        tables.read_curve(tmp_path / file)


def test_damaged_pictures_and_energies_are_named(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled / "eb_jdat/seed0"
    whole = (folder / "samples.png").read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"  # Pillow would start Ghostscript
    for content in (b"", whole[:100], b"junk", eps):
        (folder / "samples.png").write_bytes(content)
        with pytest.raises(FileError, match=r"samples\.png: damaged"):
            page.embed(folder / "samples.png")
    (folder / "samples.png").write_bytes(whole)
    monkeypatch.setattr(page, "MOST_PIXELS", 1000)
    for name in ("samples.png", "chains.gif"):
        with pytest.raises(FileError, match="pixels"):
            page.embed(folder / name)
    with np.load(folder / "energy.npz") as file:
        arrays = dict(file)
    for wrong in ({"clean": np.array(["a"])}, {"joint_clean": np.zeros((2, 2))}, {"generated": np.zeros(3, np.int64)}):
        np.savez(folder / "energy.npz", **{**arrays, **wrong})
        with pytest.raises(FileError, match=r"energy\.npz: "):
            page.energies_of(folder / "energy.npz")


def test_damaged_verdicts_are_named(profile: Profile, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled / "eb_jdat/seed0/verdicts.parquet"
    whole, frame = path.read_bytes(), pd.read_parquet(path)
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"junk" * 100):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"verdicts\.parquet: damaged"):
            tables.stands_of(filled, "eb_jdat", 0, "pgd20")
    others = (frame.drop(columns="pgd20"), frame.assign(pgd20="yes"), frame.assign(protocol="other"), frame.assign(weights=1))
    for other in others:
        other.to_parquet(path)
        with pytest.raises(FileError, match=r"verdicts\.parquet: damaged"):
            tables.stands_of(filled, "eb_jdat", 0, "pgd20")
    frame[frame["index"] < 90].to_parquet(path)
    with pytest.raises(FileError, match=r"not of the same examples \(pgd20: classifier has 100, .*eb_jdat has 90\); run the attack stage"):
        tables.pairwise(profile, filled, 0, "pgd20")
    path.write_bytes(whole)
    monkeypatch.setattr(tables, "MOST_VERDICTS", 10)
    with pytest.raises(FileError, match="rows"):
        tables.stands_of(filled, "eb_jdat", 0, "pgd20")


NASTY = "<img src=x onerror=alert(1)>|`$x_{$\"'=cmd\x1b[2J\n# head"


def test_text_of_result_files_stays_text_everywhere(profile: Profile, filled: Path) -> None:
    """Labels, notes, commits and what checks say, in HTML, Markdown, CSV and commands."""
    folder = filled / "eb_jdat/seed0"
    for stage in tables.STAGES:
        change(folder / f"{stage}.json", git_commit=f"=1+1; rm -rf {NASTY}")
    change(folder / "finetune.json", events=[NASTY])
    checks = read_json(folder / "attack.json")["checks"]
    change(folder / "attack.json", checks=[{**check, "says": NASTY, "name": f"{check['name']} {NASTY}"} for check in checks])
    card = {**CARD, "name": NASTY}
    noted = profile.experiments["eb_jdat"].model_copy(update={"note": NASTY})
    profile = profile.model_copy(update={"experiments": {**profile.experiments, "eb_jdat": noted}})
    rows = collect(profile, filled, "d1")
    html = write_page(profile, filled, rows, card)
    findings = claims.judge(claims.Evidence(profile, rows, filled))
    page.write_audit(profile, "digits", filled, card, rows, findings, filled / "audit.html")
    for text in (html, (filled / "audit.html").read_text()):
        assert "<img src=x" not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
    commands = re.findall(r'<pre class="command">git checkout (.*?)\nsnakemake', html, re.DOTALL)
    shown = f"=1+1; rm -rf {NASTY}".replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert [shown] in [shlex.split(Markup(command).unescape()) for command in commands]

    tables.write_markdown(aggregate(profile, rows), rows, profile, card, filled / "table.md")
    tables.write_audit_markdown(findings, tables.side_by_side(profile, rows), tables.checks_of(rows), filled / "audit.md")
    for file in ("table.md", "audit.md"):
        text = (filled / file).read_text()
        assert r"\<img src=x onerror=alert(1)\>\|\`\$x\_{\$" in text
        assert "\x1b" not in text
        assert "\n# head" not in text

    tables.write_summary(rows, filled / "summary.csv")
    found = {row["experiment"]: row for row in csv.DictReader((filled / "summary.csv").open())}
    assert found["eb_jdat"]["git_commit"].startswith("'=1+1; rm -rf <img")
    assert "\x1b" not in (filled / "summary.csv").read_text()
    assert found["classifier"]["git_commit"] == "abc"


def test_a_spreadsheet_computes_no_text_and_numbers_stay_numbers() -> None:
    frame = pd.DataFrame({"text": ["=1", "+1", "-1", "@x", " =1", "\t=1", "＝1", "a=1", "a,b"], "n": [-1, 2, 3, 4, 5, 6, 7, 8, 9]})
    lines = list(csv.reader(tables.spreadsheet(frame).splitlines()))
    assert [line[0] for line in lines[1:]] == ["'=1", "'+1", "'-1", "'@x", "' =1", "'\\t=1", "'＝1", "a=1", "a,b"]
    assert [line[1] for line in lines[1:4]] == ["-1", "2", "3"]


def test_class_names_are_drawn_as_they_stand(tmp_path: Path) -> None:
    """matplotlib takes "$" for mathematics, and refuses bad ones."""
    names = ("$\\frac{$", "$x$", "a\nb\x1b[2J", "c" * 300, "caf\udce9")
    figure = sample_grids({"p": (np.zeros((5, 1, 8, 8), np.uint8), np.arange(5))}, names, 1)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["$\\frac{$", "$x$", "a\\nb\\x1b[2J", "c" * 29 + "…", "caf\\udce9"]
    save(figure, tmp_path / "grid.png")


def test_labels_of_radii_do_not_stand_over_one_another() -> None:
    """Measured where matplotlib puts them."""
    radii = {"standard": 0.15, "released": 0.075, "like_released": 0.08, "half": 0.075, "far": 0.4}
    figure = inline.radius_sweep({"a": [(0.0, 1.0), (0.6, 0.1)]}, radii, 0.1)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert {text.get_text() for text in figure.axes[0].texts} == {"standard", "released, half", "like_released", "far"}
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [row for _, _, row in inline.label_rows({"a": 0.1, "b": 0.4}, 0.5)] == [0, 0]


def test_one_experiment_has_no_pairs(tmp_path: Path, profile: Profile) -> None:
    alone = profile.model_copy(update={"experiments": {"classifier": profile.experiments["classifier"]}})
    fill(alone, tmp_path)
    page.write_audit(alone, "digits", tmp_path, CARD, collect(alone, tmp_path, "d1"), [], tmp_path / "audit.html")
    html = (tmp_path / "audit.html").read_text()
    assert "One experiment: there is nothing to compare it with." in html
    assert "Filter pairs" not in html


def test_show_prints_what_the_results_say_as_it_stands(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results, words = tmp_path / "results/digits", ["show", "--params", str(ROOT / "params/digits.yaml")]
    asked = params.load(ROOT / "params/digits.yaml", [])
    fill(asked, results)
    write_result(tmp_path / "data/digits/card.json", {**CARD, "data_hash": "d1"})
    assert "table.csv: this profile has not been run yet" in CliRunner().invoke(app, words).output
    (results / "table.csv").write_text("anything")
    path = results / "classifier/seed0/generate.json"
    write_result(path, {**read_json(path), "frechet_extractor": "[red] :x: \x1b[2J"})
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    for part in ("[red]", ":x:", "\\x1b[2J"):
        assert part in shown.output
    for name in asked.experiments:
        assert name in shown.output
    path.write_bytes(path.read_bytes().replace(b"12.5", b"12.4"))
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 1
    assert "classifier/seed0/generate.json: damaged" in shown.stderr
