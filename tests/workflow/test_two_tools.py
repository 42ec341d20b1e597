"""Snakemake and DVC, the real programs, on copies of one tiny project with its results: whoever ran, the other has nothing to do."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
import yaml

from ebjdat.settings import join_overrides

from ..conftest import ROOT
from ..golden import record as golden
from .conftest import Project, ran

DOWNSTREAM = {"finetune": 1, "attack": 1, "generate": 1, "energy": 1, "reliability": 1, "report": 1}


def stamps(project: Project) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (project.folder / "checkpoints").rglob("*.safetensors")}


def test_dvc_yaml_is_up_to_date_with_the_snakefile() -> None:
    subprocess.run([sys.executable, "workflow/scripts/dvc_stages.py", "--check"], cwd=ROOT, check=True)


def test_after_snakemake_neither_tool_has_anything_to_do(after_snakemake: Project) -> None:
    before = stamps(after_snakemake)
    assert len(before) == 4
    assert (after_snakemake.folder / "results/digits/summary.csv").read_text().count("\n") == 3
    assert after_snakemake.planned() == {}
    assert after_snakemake.status() == {}
    assert ran(after_snakemake.run("dvc", "repro")) == set()
    assert after_snakemake.planned() == {}
    assert stamps(after_snakemake) == before


def test_results_are_those_of_the_golden_record(made_by_snakemake: Project) -> None:
    """To the bit on a machine like the one that made it; elsewhere the same files with the same names in them."""
    before = json.loads((ROOT / "tests/golden/tiny.json").read_text())
    now = json.loads(json.dumps(golden.record(made_by_snakemake.folder, "digits")))
    assert {file: sorted(content) for file, content in now.items()} == {file: sorted(content) for file, content in before.items()}
    if now["machine"] == before["machine"]:
        assert golden.differences(before, now) == []


LOADED = """
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", *sys.modules))
runpy.run_module("ebjdat", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("stage", ["show", "report", "attack"])
def test_what_takes_long_to_import_is_imported_where_it_is_needed(stage: str, after_snakemake: Project) -> None:
    """torch takes seconds, its compiler as many again."""
    words = [stage, "--params", "params/digits.yaml"]
    if stage != "show":
        log = after_snakemake.run("snakemake", "--dry-run", "--printshellcmds", "--forcerun", stage, "--cores", "1")
        command = re.search(rf"python -m ebjdat ({stage} .*?--(?:experiment eb_jdat|card) .*?)(?: 2>&1| > )", log)
        assert command
        words = shlex.split(command[1])
    modules = after_snakemake.run("python", "-c", LOADED, *words).split("loaded:")[1].split()
    assert "ebjdat.settings" in modules
    assert "torch._dynamo" not in modules
    assert ("torch" in modules) == (stage == "attack")


def test_snakemakes_own_report_has_every_result_with_its_caption(after_snakemake: Project) -> None:
    after_snakemake.run("snakemake", "--report", "snakemake-report.html")
    text = (after_snakemake.folder / "snakemake-report.html").read_text()
    for name in ("table.md", "report.html", "audit.html", "samples.png", "chains.gif", "energy.png", "reliability.png"):
        assert name in text
    captions = (
        "integrity checks of every evaluation",
        "Chains of eb_jdat, seed 0",
        "Calibration of classifier, seed 0",
        "buffer of eb_jdat",
    )
    for caption in (*captions, "fresh chains under eb_jdat, seed 0", "Experiments by metrics", "EB-JDAT reproduction, profile"):
        assert caption in text


def test_snakemake_reruns_what_a_finetuning_parameter_changes_and_nothing_else(after_snakemake: Project) -> None:
    after_snakemake.change(experiments={"eb_jdat": {"training": {"optimizer": {"lr": 0.01}}}})
    plan = after_snakemake.plan()
    assert {k: v for k, v in after_snakemake.jobs(plan).items() if k not in ("all", "record")} == DOWNSTREAM
    touched = {t for t in after_snakemake.targets(plan) if t.startswith(("checkpoints/", "results/digits/"))}
    single = {t for t in touched if not re.fullmatch(r"results/digits/[a-z.]+", t)}
    assert single
    assert all("/eb_jdat/seed0" in t for t in single)
    assert set(after_snakemake.status()) == {"finetune-eb_jdat-seed0", "report"}  # those that read the setting itself


def test_dvc_reruns_what_snakemake_planned_and_leaves_nothing_for_it(after_snakemake: Project) -> None:
    """(A training is run again by both in test_versions.py.)"""
    after_snakemake.change(evaluation={"energy": {"n": 20}})
    assert after_snakemake.planned() == {"energy": 2, "report": 1, "record": 1, "all": 1}
    before = stamps(after_snakemake)
    assert ran(after_snakemake.run("dvc", "repro")) == {"report", "energy-classifier-seed0", "energy-eb_jdat-seed0"}
    assert stamps(after_snakemake) == before
    assert after_snakemake.planned() == {}


def test_a_row_of_the_family_reruns_what_stands_on_it_alone(after_snakemake: Project) -> None:
    file = after_snakemake.folder / "params/digits.yaml"
    old = file.read_text()
    after_snakemake.change(bases={"jempp": {"chain": {"step_size": 0.05}}})
    plan = after_snakemake.plan()
    assert {k: v for k, v in after_snakemake.jobs(plan).items() if k not in ("all", "record")} == DOWNSTREAM
    assert not any("/classifier/" in name for name in after_snakemake.targets(plan))
    assert set(after_snakemake.status()) == {"finetune-eb_jdat-seed0", "report"}
    file.write_text(old)
    after_snakemake.change(bases={"sadajem": {"chain": {"step_size": 0.05}}})
    assert after_snakemake.planned() == {}


def test_key_order_and_comments_of_the_profile_mean_nothing(after_snakemake: Project) -> None:
    file = after_snakemake.folder / "params/digits.yaml"
    file.write_text("# a comment\n" + yaml.safe_dump(yaml.safe_load(file.read_text()), sort_keys=True))
    assert after_snakemake.planned() == {}
    assert ran(after_snakemake.run("dvc", "repro")) == set()


EDITS = {
    "a docstring": ("samplers/pyld.py", '"""', '"""Edited. ', {}, set()),
    "energies": (
        "evaluation/energy.py",
        "    return ",
        "    assert True\n    return ",
        {"energy": 2, "report": 1},
        {"energy-classifier-seed0", "energy-eb_jdat-seed0"},
    ),
    "the loop": (
        "training/loop.py",
        "def train(",
        "assert True\n\n\ndef train(",
        {"pretrain": 2, **{stage: 2 for stage in DOWNSTREAM if stage != "report"}, "report": 1},
        {f"{stage}-seed0" for stage in ("pretrain-clean", "pretrain-scratch", "finetune-classifier", "finetune-eb_jdat")},
    ),
}


def test_an_edit_of_code_reruns_what_can_execute_it_under_both(after_snakemake: Project) -> None:
    """Each edit by itself: it is taken back before the next."""
    for what, (file, old, new, jobs, stages) in EDITS.items():
        path = after_snakemake.folder / "src/ebjdat" / file
        before = path.read_text()
        path.write_text(before.replace(old, new, 1))
        assert path.read_text() != before
        assert {rule: n for rule, n in after_snakemake.planned().items() if rule not in ("all", "record")} == jobs, what
        assert set(after_snakemake.status()) == stages, what  # what follows from them shows only once they have run
        path.write_text(before)
    assert after_snakemake.status() == {}


def test_nothing_is_recorded_when_settings_or_code_changed_while_it_ran(after_snakemake: Project) -> None:
    """A run keeps what its jobs depend on when it begins; anything else now means old results under new settings."""
    file = after_snakemake.folder / "params/digits.yaml"
    old = file.read_text()
    after_snakemake.change(evaluation={"energy": {"n": 30}})
    text = after_snakemake.run("python", "workflow/scripts/dvc_stages.py", "--recordable", ok=False)
    file.write_text(old)
    assert "settings or code changed while this ran: nothing is recorded" in text
    after_snakemake.run("python", "workflow/scripts/dvc_stages.py", "--recordable")


def test_settings_that_cannot_work_stop_before_anything_runs(after_snakemake: Project) -> None:
    for tool in (["snakemake", "--cores", "1"], ["snakemake", "--lint"]):
        text = after_snakemake.run(*tool, "--config", "overrides=training.epocs=3 evaluation.attack.protocols.standard.eps=0", ok=False)
        assert "2 problems in the settings" in text
        assert "did you mean 'epochs'?" in text
        assert "evaluation.attack.protocols.standard.eps: input should be greater than 0" in text
        assert "Traceback" not in text


def test_code_of_another_checkout_stops_before_anything_runs(after_snakemake: Project) -> None:
    text = after_snakemake.run("snakemake", "--cores", "1", ok=False, PYTHONPATH=str(ROOT / "src"))
    assert f"this folder belongs to the checkout {after_snakemake.folder}, but the code that would run is that of {ROOT}" in text
    assert "Traceback" not in text
    assert "jobs" not in text


def test_weights_of_inception_are_an_input(after_snakemake: Project) -> None:
    given = "evaluation.generate.inception_weights=given.pth"
    (after_snakemake.folder / "given.pth").touch()
    text = after_snakemake.run("snakemake", "--dry-run", "--config", "profile=cifar10-folder", f"overrides={given}")
    using = re.findall(r"^rule (\w+):\n    input: .*, given\.pth", text, re.M)
    assert using
    assert set(using) == {"generate"}


def test_overridden_runs_keep_to_themselves(after_snakemake: Project) -> None:
    """With the path of a file that a shell, YAML and Snakemake would each read in another way."""
    path = "my $x 'ü' #2 & (b).tar.xz"
    (after_snakemake.folder / path).touch()
    words = [f"evaluation.reliability.ood_path={path}", "training={epochs: 2}"]
    text = after_snakemake.run("snakemake", "--dry-run", "--printshellcmds", "--config", f"overrides={join_overrides(words)}")
    commands = [shlex.split(line) for line in re.findall(r"^Shell command: (.*--override.*)$", text, re.M)]
    assert commands
    assert all(words == [b for a, b in pairwise(command) if a == "--override"] for command in commands)
    assert len(re.findall(rf"^    input: .*, {re.escape(path)}$", text, re.M)) == 2  # reliability of both experiments
    for name in ("x{a}.zip", "a, b.zip"):
        (after_snakemake.folder / name).touch()
        refused = after_snakemake.run(
            "snakemake", "--dry-run", "--config", f'overrides=["evaluation.reliability.ood_path={name}"]', ok=False
        )
        assert f"{name!r}: braces and ', ' in a path mean something else" in refused
    outputs = after_snakemake.targets(text)
    assert outputs
    assert all(re.match(r"(data|checkpoints|results)/digits\+[0-9a-f]{6}/", name) for name in outputs)
