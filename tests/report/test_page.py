"""The pages: self-contained, everything escaped, every experiment with its own figures, commands that reproduce a row."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.files import FileError, read_json, write_result
from ebjdat.metrics import TABLE, TEACHING
from ebjdat.report import page
from ebjdat.report.collect import RunResult, checks_of, collect
from ebjdat.report.format import side_by_side, write_audit_markdown, write_markdown
from ebjdat.report.summary import aggregate, write_summary
from ebjdat.settings import Profile, load

from ..conftest import ROOT
from .results import CARD, change, fill, seal, site_of, with_metrics

STUDENT = "experiments.s={method: ard, pretraining: clean, training: {teacher: {experiment: pgd_at}}}"
TAUGHT = ["evaluation.teacher={recipe: pgd_at}", STUDENT]
LINKS = r"(?:src|href)=[\"'](?!data:|#)([^\"']*)"
STAGES = ("finetune", "attack", "generate", "energy", "reliability")
METRIC = {metric.name: metric for metric in TABLE}


def write_page(site: page.Site, out: Path) -> str:
    page.write(site, aggregate(site.profile, site.runs), out)
    return out.read_text()


def write_audit(site: page.Site, out: Path) -> str:
    page.write_audit(site, out)
    return out.read_text()


@pytest.fixture(scope="module")
def html(profile: Profile, made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(site_of(profile, made), tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_is_self_contained(profile: Profile, html: str) -> None:
    assert set(re.findall(LINKS, html)) == {"audit.html", "audit.html#checks", "audit.html#pairs"}
    assert "http" not in re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", html).replace("http-equiv", "")
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", html)]
    assert len(pictures) == 3 * len(profile.experiments)
    assert all(p[:4] in (b"RIFF", b"GIF8", b"\x89PNG") for p in pictures)


def test_frequent_and_rare_classes_are_shown_where_they_were_measured(
    profile: Profile, runs: list[RunResult], made: Path, html: str, tmp_path: Path
) -> None:
    assert "Frequent and rare classes" not in html
    tail = {"clean_tail_acc": 0.5, "clean_tail_correct": 40, "n_tail": 80}
    text = write_page(site_of(profile, made, with_metrics(runs, pgd_at=tail)), tmp_path / "report.html")
    section = text[text.index('<h3 id="tail">') : text.index('<h3 id="samples">')]
    assert "50.0<br><small>[39.3, 60.7]" in section
    assert "The training split is long-tailed" in section


def test_only_the_pages_own_script_may_run(html: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_every_experiment_has_a_section_with_its_own(profile: Profile, html: str) -> None:
    for i, name in enumerate(profile.experiments):
        section = html[html.index(f'<details class="experiment" id="experiment-{name}"') :].split("\n</details>")[0]
        assert section.count("data:image") == 3
        assert section.count("<svg") == 2
        assert f"fresh chains {12.5 + i:.2f} (n = 200)" in section
        assert "black-box attack adds nothing (standard): 0.05, limit 0.01" in section
    assert "diverged, 1 of 1: epoch 2; 1 healed" in section
    assert "seed 0: epoch 2, step 5: seen; done" in section
    row = html[html.index("<tbody>") :].split("</tr>")[0]
    assert "✗ 1 check failed" in row  # at its name in the summary
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_figures_take_the_colours_of_the_page(html: str) -> None:
    for drawn in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawn.replace("#ffffff", ""))  # markers' edges
        assert 'aria-label="' in drawn.split(">")[0]


@pytest.mark.parametrize(
    ("name", "rows", "marks"),
    [
        ("clean_acc", [(0.5, 0.4, 0.6), (0.9, 0.8, 0.95), (0.7, 0.6, 0.75)], ["", "best", ""]),
        ("energy_gap_generated", [(0.5, 0.4, 0.6), (0.9, 0.8, 0.95)], ["best", ""]),  # lower is better
        ("clean_acc", [(0.5, 0.4, 0.6), (0.9, 0.8, 0.95), (0.85, 0.7, 0.9)], ["", "tied", "tied"]),
        ("clean_acc", [(0.88, 0.8, 0.95), (0.9, 0.8, 0.95)], ["", ""]),  # all overlap
        ("clean_acc", [(0.5, np.nan, np.nan), (0.9, 0.8, 0.95)], ["", ""]),  # the other's uncertainty is unknown
        ("clean_acc", [(np.nan, np.nan, np.nan), (0.9, 0.8, 0.95), (0.5, 0.4, 0.6)], ["", "best", ""]),
        ("train_seconds", [(5.0, 4.0, 6.0), (9.0, 8.0, 9.5)], ["", ""]),  # also depends on the machine
    ],
)
def test_a_best_value_is_marked_only_as_far_as_intervals_allow(name: str, rows: list[tuple[float, float, float]], marks: list[str]) -> None:
    table = pd.DataFrame(rows, columns=[name, f"{name}_low", f"{name}_high"])
    assert page.best_marks(table, METRIC[name]) == marks
    assert page.best_marks(table[[name]], METRIC[name]) == [""] * len(rows)


@pytest.mark.parametrize(
    ("commits", "start", "note"),
    [
        ({}, "git checkout abc\n", ""),
        ({"attack": "def"}, "git checkout def\n", "finetune at abc, attack at def"),
        ({"attack": "abc-dirty"}, "git checkout abc\n", "not committed"),
        (dict.fromkeys(STAGES, "unknown"), "snakemake", "commit is unknown"),
    ],
)
def test_commands_reproduce_a_row_and_state_what_is_unknown(
    profile: Profile, filled: Path, commits: dict[str, str], start: str, note: str
) -> None:
    for stage, commit in commits.items():
        change(filled / f"classifier/seed0/{stage}.json", git_commit=commit)
    run = collect(profile, filled, "d1")[0]
    command, notes = page.reproduce(STAGES, "digits+ci", filled, run, ["params/overrides/ci.yaml", "data.path=my images"])
    assert command.startswith(start)
    assert (note in notes) if note else (notes == "")
    words = shlex.split(command.splitlines()[-1])
    assert words[:4] == ["snakemake", "--cores", "all", "--config"]
    assert words[4:7] == ["profile=digits", 'overrides=["params/overrides/ci.yaml", "data.path=my images"]', "--"]
    assert words[7:] == [f"results/digits+ci/classifier/seed0/{stage}.json" for stage in STAGES]


def test_teachers_have_a_table_where_they_were_measured(tmp_path: Path) -> None:
    profile = load(ROOT / "params/digits.yaml", TAUGHT)
    results = fill(profile, tmp_path / "results")
    values = {"n_teaching": 50, "n_recipes": 1, "robust_overfitting": 0.125, "git_commit": "abc"}
    for i, name in enumerate(TEACHING):
        values |= {f"teacher_entropy_{name}": i + 0.25, f"teacher_confidence_{name}": 0.5, f"n_{name}": 10 + i}
    write_result(results / "s/seed0/teacher.json", {**values, "teacher_entropy_unlearned": None, "n_unlearned": 0}, [])
    text = write_page(site_of(profile, results), tmp_path / "report.html")
    rows = text.split('id="teachers"')[1].split("</table>")[0].split("<tr")[2:]
    assert len(rows) == 1  # the student's
    assert all(value in rows[0] for value in (">s<", "1.250", "12.5"))
    assert "results/digits/s/seed0/teacher.json" in text  # the command that reproduces the row asks for it
    without = load(ROOT / "params/digits.yaml")
    assert 'id="teachers"' not in write_page(site_of(without, fill(without, tmp_path / "b")), tmp_path / "b.html")


def test_settings_are_shown_where_experiments_differ(profile: Profile) -> None:
    settings = page.differing_settings(profile)
    assert (settings["jempp"]["training.optimizer.lr"], settings["eb_jdat"]["training.optimizer.lr"]) == (0.1, 0.3)
    assert "training.batch_size" not in settings["eb_jdat"]
    assert not any(key.startswith("evaluation") for key in settings["eb_jdat"])


def test_the_audit_page_shows_claims_checks_and_pairs(profile: Profile, made: Path, tmp_path: Path) -> None:
    site = site_of(profile, made)
    html = write_audit(site, tmp_path / "audit.html")
    assert set(re.findall(LINKS, html)) == {"report.html"}
    assert html.count("<script") == 1
    assert html.count('<span class="fail">FAIL</span>') == len(profile.experiments)
    assert html.count("0.05 &gt; 0.01") + html.count("0.05 > 0.01") == len(profile.experiments)
    assert html.count("not run") == len(profile.experiments)
    assert "McNemar" in html
    for finding in site.findings:
        assert f'<span class="{finding.verdict}">{finding.verdict}</span>' in html
    write_audit_markdown(site.findings, site.comparisons, side_by_side(profile, site.runs), checks_of(site.runs), tmp_path / "audit.md")
    text = (tmp_path / "audit.md").read_text()
    assert "- eb_jdat, seed 0: black-box attack adds nothing [standard]: 0.05, limit 0.01 (figure)" in text
    assert all(finding.claim in text for finding in site.findings)
    for page_text in (html, text):
        assert "jkcjkc/EB-JDAT at 327ea16 (May 2025)" in page_text
        assert "a later release may differ" in page_text


def test_one_experiment_has_no_pairs(profile: Profile, made: Path, tmp_path: Path) -> None:
    alone = dataclasses.replace(profile, experiments={"classifier": profile.experiments["classifier"]})
    html = write_audit(site_of(alone, made), tmp_path / "audit.html")
    assert "One experiment: there is nothing to compare it with." in html
    assert "Filter pairs" not in html


def test_averaged_weights_and_unmeasured_values_are_on_the_page(
    profile: Profile, runs: list[RunResult], made: Path, tmp_path: Path
) -> None:
    ema = {"ema_clean_acc": 0.95, "autoattack_acc": None}
    html = write_page(site_of(profile, made, with_metrics(runs, classifier=ema)), tmp_path / "report.html")
    assert "90.0 → 95.0" in html
    assert "not measured" in html


@pytest.mark.slow
def test_the_page_shows_the_warnings_of_the_data_card(profile: Profile, made: Path, html: str, tmp_path: Path) -> None:
    noted = {"duplicates": {"test_in_train": 40, "conflicting_labels": 0}, "notes": ["the folder '<b>' is the train split"]}
    warning = "test images that are training images too, pixel by pixel: 40"
    warned = write_page(site_of(profile, made, card={**CARD, **noted, "warnings": [warning]}), tmp_path / "report.html")
    data = warned[warned.index('<details id="data">') : warned.index("</details>", warned.index('<details id="data">'))]
    assert '<span class="flag">1 warning</span>' in data
    assert f'<li class="fail">{warning}</li>' in data
    assert "<dt><code>test_in_train</code></dt><dd>40</dd>" in data
    assert "<b>' is" not in data
    clean = write_page(site_of(profile, made, card={**CARD, **noted, "warnings": []}), tmp_path / "report.html")
    assert "no warnings" in clean[clean.index('<details id="data">') :][:200]
    assert '<details id="data">' not in html  # a card of an earlier version


def test_values_that_were_not_finite_are_not_shown_as_numbers(profile: Profile, filled: Path) -> None:
    """Results of a network that diverged: null in JSON, NaN among the energies."""
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
    html = write_page(site_of(profile, filled), filled / "report.html")
    assert "fresh chains – (n = 200), their starts alone –" in html
    assert "<td>–</td>" in html


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


NASTY = "<img src=x onerror=alert(1)>|`$x_{$\"'=cmd\x1b[2J\n# head"


@pytest.mark.slow
def test_text_of_result_files_stays_text_everywhere(profile: Profile, filled: Path) -> None:
    """Labels, notes, commits and texts of checks, in HTML, Markdown, CSV and commands."""
    folder = filled / "eb_jdat/seed0"
    for stage in STAGES:
        change(folder / f"{stage}.json", git_commit=f"=1+1; rm -rf {NASTY}")
    change(folder / "finetune.json", events=[NASTY])
    checks = read_json(folder / "attack.json")["checks"]
    change(folder / "attack.json", checks=[{**check, "says": NASTY, "name": f"{check['name']} {NASTY}"} for check in checks])
    noted = dataclasses.replace(profile.experiments["eb_jdat"], note=NASTY)
    profile = dataclasses.replace(profile, experiments={**profile.experiments, "eb_jdat": noted})
    site = site_of(profile, filled, card={**CARD, "name": NASTY + "<script>alert(1)</script>"})
    html, audit = write_page(site, filled / "report.html"), write_audit(site, filled / "audit.html")
    for text in (html, audit):
        assert text.count("<script") == 1
        assert "<img src=x" not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
    commands = re.findall(r'<pre class="command">git checkout (.*?)\nsnakemake', html, re.DOTALL)
    shown = f"=1+1; rm -rf {NASTY}".replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert [shown] in [shlex.split(Markup(command).unescape()) for command in commands]

    write_markdown(aggregate(profile, site.runs), site.runs, profile, site.card, filled / "table.md")
    write_audit_markdown(site.findings, site.comparisons, side_by_side(profile, site.runs), checks_of(site.runs), filled / "audit.md")
    for file in ("table.md", "audit.md"):
        text = (filled / file).read_text()
        assert r"\<img src=x onerror=alert(1)\>\|\`\$x\_{\$" in text
        assert "\x1b" not in text
        assert "\n# head" not in text

    write_summary(site.runs, filled / "summary.csv")
    rows = {row["experiment"]: row for row in csv.DictReader((filled / "summary.csv").open())}
    assert rows["eb_jdat"]["git_commit"].startswith("'=1+1; rm -rf <img")
    assert "\x1b" not in (filled / "summary.csv").read_text()
    assert rows["classifier"]["git_commit"] == "abc"


@pytest.mark.slow
def test_reports_never_import_torch() -> None:
    code = "import sys, ebjdat.report.page, ebjdat.report.claims, ebjdat.report.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_show_prints_results_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results, words = tmp_path / "results/digits", ["show", "--params", str(ROOT / "params/digits.yaml")]
    asked = load(ROOT / "params/digits.yaml", [])
    fill(asked, results)
    write_result(tmp_path / "data/digits/card.json", {**CARD, "data_hash": "d1"})
    assert "table.csv: this profile has not been run yet" in CliRunner().invoke(app, words).output
    (results / "table.csv").write_text("anything")
    path = results / "classifier/seed0/generate.json"
    write_result(path, {**read_json(path), "frechet_extractor": "[red] :x: \x1b[2J"})
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    for part in ("[red]", ":x:", "\\x1b[2J", *asked.experiments):
        assert part in shown.output
    path.write_bytes(path.read_bytes().replace(b"12.5", b"12.4"))
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 1
    assert "classifier/seed0/generate.json: damaged" in shown.stderr


def test_what_is_measured_only_on_request_has_a_table_only_then(profile: Profile, made: Path, html: str, tmp_path: Path) -> None:
    """Each value in a cell of its table, under its heading; a column that nobody measured is left out."""
    optional = ("found", "universal", "screen")
    assert not any(f'<h3 id="{name}">' in html for name in optional)
    values = {"pgd20_found_l2": 0.8125, "pgd20_found_n": 33, "pgd20_found_ssim": 0.9375}
    values |= {"universal_acc": 0.625, "universal_low": 0.5, "universal_high": 0.75}
    values |= {"screen_agreement": 0.5625, "screen_success": 0.25, "screen_fgsm_broken": 12, "n_screen": 88}
    values |= {"detect_auroc_evaded_autoencoder_standard": 0.4375}
    values |= {f"detect_auroc_evaded_autoencoder_standard_{end}": x for end, x in (("low", 0.375), ("high", 0.5))}
    runs = with_metrics(collect(profile, made, "d1"), **{next(iter(profile.experiments)): values})
    text = write_page(site_of(profile, made, runs), tmp_path / "report.html")
    parts = {name: text.split(f'<h3 id="{name}">')[1].split("<h3")[0] for name in (*optional, "reliability")}
    for name, heads, cells in (
        ("found", ["L2, PGD-20", "SSIM, PGD-20"], ["0.81<br><small>(n = 33)</small>", "0.938"]),
        ("universal", ["universal perturbation %"], ["62.5<br><small>[50.0, 75.0]</small>"]),
        ("screen", ["sign agreement %", "success / FGSM&#39;s", "FGSM breaks"], ["56.2", "0.25", "12<br><small>(n = 88)</small>"]),
        ("reliability", ["evading PGD, standard (autoencoder)"], ["43.8<br><small>[37.5, 50.0]</small>"]),
    ):
        plain = re.sub(r"<br><small>(?=[^(\[])", ", ", parts[name].split("</thead>")[0]).replace("</small>", "")
        assert all(head in plain for head in heads), (name, plain)
        assert all(f"<td>{cell}</td>" in parts[name] for cell in cells), (name, parts[name])
    assert "a screen, not a measure of robustness" in parts["screen"].lower()
    assert "AutoAttack" not in parts["found"].split("</thead>")[0].split("<thead>")[1]
