"""CONTRIBUTING's worked examples, made in a copy of the project exactly as they are written there, then tested and trained.

Their tests run in one process, and commands in forks of one that has imported torch: each alone would take seconds to begin.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cached_property
from pathlib import Path

import pytest

from .conftest import ROOT
from .workflow import warm

pytestmark = pytest.mark.slow
PLACE = re.compile(
    r"^\*\*`(?P<path>[^`]+)`\*\*, "
    r"(?P<how>at its end|a new file|in `(?P<name>\w+)`(, before `(?P<entry>\w+)`)?|before `(?P<line>[^`]+)`"
    r"|after `(?P<after>[^`]+)`|under `(?P<key>\w+)`)"
    r".*?^```\w+\n(?P<code>.*?)^```$",
    re.M | re.S,
)


class Copy:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "tests", "params", "workflow", "docs", "profiles"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("pyproject.toml", "dvc.yaml", "CONTRIBUTING.md", "Snakefile"):
            shutil.copy(ROOT / name, folder / name)
        self.done = [self.apply(place) for place in PLACE.finditer((ROOT / "CONTRIBUTING.md").read_text())]

    def apply(self, place: re.Match[str]) -> str:
        file = self.folder / place["path"]
        if place["how"] == "a new file":
            assert not file.exists()
            file.write_text(place["code"])
            return place["path"]
        text = file.read_text()
        if place["how"] == "at its end":
            text = f"{text}\n\n{place['code']}"
        elif place["entry"] or place["line"]:
            line = rf'^    "{place["entry"]}": ' if place["entry"] else f"^{re.escape(place['line'])}"
            (found,) = re.finditer(line, text, re.M)
            text = f"{text[: found.start()]}{place['code']}{'' if place['entry'] else chr(10) * 2}{text[found.start() :]}"
        else:
            heading = rf"{place['name']}: .* = [{{(]" if place["name"] else f"{place['key']}:"
            line = f"^{re.escape(place['after']) if place['after'] else heading}$"
            (found,) = re.finditer(line, text, re.M)
            text = f"{text[: found.end()]}\n{place['code']}{text[found.end() + 1 :]}"
        file.write_text(text)
        return place["path"]

    def run(self, *command: str) -> str:
        path = f"{warm.programs()}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder / "src"), "EBJDAT_TRACKING": "0"}
        words = [warm.programs() / "python", "-m", *command]
        done = subprocess.run(words, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def edits(self, first: str, n: int) -> list[str]:
        """The file of the first edit, and those that follow."""
        at = self.done.index(first)
        return self.done[at : at + n]

    @cached_property
    def passed(self) -> list[str]:
        """Tests that pass: the examples' own, and those of the table of metrics, whose document is made anew as is said there."""
        (self.folder / "docs/metrics.md").write_text(self.run("ebjdat", "metrics", "--markdown"))
        files = sorted(
            {path for path in self.done if path.startswith("tests/")} | {"tests/test_metrics.py", "tests/report/test_summary.py"}
        )
        said = self.run("pytest", *files, "-k", " or ".join(OWN + METRICS), "-n0", "-rp", "-p", "no:cacheprovider")
        return re.findall(r"^PASSED tests/\S+::test_(\w+)", said, re.M)


OWN = ("logit_pairing", "mala", "short_step", "shapes", "margins", "robust_ece")
METRICS = ("names_that_an_entry_refers", "the_document", "headline")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("contributing"))


def test_every_example_is_applied_passes_its_own_tests_and_is_linted(copy: Copy) -> None:
    assert len(copy.done) == (ROOT / "CONTRIBUTING.md").read_text().count("\n**`")  # every place that is named
    assert len(copy.passed) == len(OWN + METRICS)
    assert all(any(name in passed for passed in copy.passed) for name in OWN + METRICS)
    copy.run("ruff", "check", "src", "tests")
    copy.run("ruff", "format", "--check", "src", "tests")


def test_a_data_source_is_one_function_one_record_one_test_and_a_profile(copy: Copy) -> None:
    edits = ["src/ebjdat/data/sources.py", "src/ebjdat/registry/data.py", "params/overrides/shapes.yaml", "tests/data/test_sources.py"]
    assert copy.edits(edits[0], 4) == edits
    settings = ("--params", "params/digits.yaml", "--override", "params/overrides/ci.yaml", "--override", "params/overrides/shapes.yaml")
    text = copy.run("ebjdat", "prepare", *settings, "--out", "shapes.npz", "--card", "shapes.json")
    assert text.startswith("shapes: 720 train, 80 validation, 100 test; [1, 16, 16] uint8, 4 classes")
    outputs = ("--out", "shapes.safetensors", "--metrics", "shapes-clean.json", "--curve", "shapes.csv")
    copy.run("ebjdat", "pretrain", *settings, "--pretraining", "clean", "--seed", "0", "--data", "shapes.npz", *outputs)


def test_an_evaluation_stage_is_six_files(copy: Copy) -> None:
    edits = ["src/ebjdat/stages/margins.py", "src/ebjdat/jobs.py", "src/ebjdat/cli.py", "workflow/rules/evaluate.smk"]
    edits += ["src/ebjdat/metrics/evaluation.py", "src/ebjdat/metrics/evaluation.py", "tests/stages/test_margins.py"]
    assert copy.edits(edits[0], 7) == edits
    plan = copy.run("snakemake", "--dry-run", "--cores", "1", "--nolock")
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", plan, re.M))
    assert jobs["margins"] == jobs["attack"]
    assert "results/digits/eb_jdat/seed0/margins.json" in re.search(r"rule report:\n    input: (.*)", plan)[1]  # type: ignore[index]
    copy.run("snakefmt", "--check", "workflow")


def test_a_metric_is_three_edits_and_then_in_the_report_mlflow_and_dvc(copy: Copy) -> None:
    edits = ["src/ebjdat/stages/reliability.py", "src/ebjdat/metrics/evaluation.py", "tests/stages/test_reliability.py"]
    assert copy.edits(edits[0], 3) == edits
    (copy.folder / "show.py").write_text(
        "from ebjdat.metrics import HEADLINE, SUMMARY\n"
        "from ebjdat.report.format import seed_table\n"
        "print(HEADLINE[-1], SUMMARY[-1], seed_table('reliability', '', {'a': {'robust_ece': 0.25}, 'b': {}}))\n"
    )
    shown = copy.run("show")
    assert shown.startswith("robust_ece robust_ece ")  # what DVC compares, and summary.csv
    assert "['', 'robust ECE %'" in shown
    assert "['a', '25.0'" in shown


def test_strategies_are_listed_and_train_from_the_command_line(copy: Copy) -> None:
    listed = json.loads(copy.run("ebjdat", "methods", "--json"))
    assert listed["methods"]["logit_pairing"]["source"].startswith("ALP")
    assert set(listed["samplers"]["mala"]["defaults"]) == {"steps", "step_size"}
    assert set(listed["updates"]["short_step"]["defaults"]) == {"rho"}
    assert "squared logits" in copy.run("ebjdat", "metrics", "pairing")
    settings = ("--params", "params/digits.yaml", "--override", "params/overrides/ci.yaml")
    copy.run("ebjdat", "prepare", *settings, "--out", "data.npz", "--card", "card.json")
    outputs = ("--out", "clean.safetensors", "--metrics", "clean.json", "--curve", "clean.csv")
    copy.run("ebjdat", "pretrain", *settings, "--pretraining", "clean", "--seed", "0", "--data", "data.npz", *outputs)
    for name, logged in (("logit_pairing", "pairing"), ("jempp_mala", "energy_generated"), ("pgd_at_short_step", "ce_robust")):
        outputs = ("--out", f"{name}.safetensors", "--metrics", f"{name}.json", "--curve", f"{name}.csv")
        where = ("--experiment", name, "--seed", "0", "--data", "data.npz", "--initial", "clean.safetensors")
        copy.run("ebjdat", "finetune", *settings, *where, *outputs)
        header, row = (copy.folder / f"{name}.csv").read_text().splitlines()
        assert float(dict(zip(header.split(","), row.split(","), strict=True))[logged]) != 0
