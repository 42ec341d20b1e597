"""The table of stages: its files fit together, and its commands are ones that the command line takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer

from ebjdat import jobs, registry
from ebjdat.cli import app
from ebjdat.jobs import STAGES
from ebjdat.layout import Layout
from ebjdat.settings import Profile, load

from .conftest import ROOT

EXTERNAL = "experiment: null, model: 'a:b'"
PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


@pytest.fixture(params=PROFILES)
def shipped(request: pytest.FixtureRequest) -> tuple[str, Profile]:
    return request.param, load(ROOT / f"params/{request.param}.yaml")


def test_a_job_reads_what_earlier_jobs_write_and_no_two_write_the_same(shipped: tuple[str, Profile]) -> None:
    name, profile = shipped
    layout, made = Layout(name), Counter[str]()
    for job in jobs.jobs(profile):
        read = [file for option, group in jobs.inputs(profile, layout, job).items() if option != "archive" for file in group]
        assert {file for file in read if file not in made} == set(), job
        made.update(jobs.outputs(layout, job).values())
    assert set(made.values()) == {1}
    assert len({job.title for job in jobs.jobs(profile)}) == len(jobs.jobs(profile))
    assert len(jobs.jobs(profile)) == 2 + len(profile.seeds) * (
        len({e.pretraining for e in profile.experiments.values()})
        + 5 * len(profile.experiments)
        + sum(e.training.teacher is not None for e in profile.experiments.values() if profile.evaluation.teacher)
    )


def test_a_student_reads_the_checkpoint_of_its_teacher_of_the_same_or_the_named_seed(tmp_path: Path) -> None:
    options = ["experiments.s={method: ard, pretraining: clean, training: {teacher: {experiment: pgd_at}}}", "seeds=[0, 1]"]
    for more, seeds in (([], {0: 0, 1: 1}), (["experiments.s.training.teacher.seed=1"], {0: 1, 1: 1})):
        profile = load(ROOT / "params/digits.yaml", [*options, *more])
        for own, of in seeds.items():
            job = jobs.Job("finetune", "s", own)
            words = jobs.command(profile, Layout("digits"), job, [])
            assert words[words.index("--teacher") + 1] == f"checkpoints/digits/pgd_at/seed{of}.safetensors"
        order = jobs.jobs(profile)
        assert order.index(jobs.Job("finetune", "pgd_at", 1)) < order.index(jobs.Job("finetune", "s", 0))
    (tmp_path / "w.pt").touch()
    profile = load(ROOT / "params/digits.yaml", [*options, f"experiments.s.training.teacher={{{EXTERNAL}, weights: {tmp_path}/w.pt}}"])
    assert jobs.inputs(profile, Layout("digits"), jobs.Job("finetune", "s", 0))["teacher"] == [f"{tmp_path}/w.pt"]
    with_teacher = [f"experiments.s.training.teacher={{{EXTERNAL}}}"]
    assert jobs.inputs(load(ROOT / "params/digits.yaml", [*options, *with_teacher]), Layout("digits"), job)["teacher"] == []


def test_every_command_is_one_that_the_command_line_takes(profile: Profile) -> None:
    """With every option that it demands, and none that it does not know."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for job in jobs.jobs(profile):
        stage, *words = jobs.command(profile, Layout("digits"), job, ["--params", "params/digits.yaml", "--override", "a=b"])
        context = group.commands[stage].make_context(stage, words)
        given = {value for value in context.params.values() if isinstance(value, Path | str)}
        assert {Path(file) for file in jobs.outputs(Layout("digits"), job).values() if not file.endswith("journal.jsonl")} <= {
            *map(Path, given)
        }


@pytest.mark.parametrize(
    ("setting", "jobs_of"),
    [
        ("runtime.threads=7", {}),  # where and how fast it runs changes nothing
        ("bases.jem.chain.steps=3", {}),  # no experiment inherits it
        ("experiments.eb_jdat.note=another", {}),
        ("pretraining.spare={method: pgd_at, epochs: 1}", {}),  # no experiment starts from it: there is no such job
        ("experiments.eb_jdat.training.weights.w2=0.123", {"finetune": ["eb_jdat"]}),
        ("pretraining.clean.epochs=7", {"pretrain": ["clean"]}),
        ("model.width=3", {"pretrain": ["scratch", "clean"], "finetune": ...}),
        ("evaluation.generate.seed=12345", {"generate": ...}),
        ("evaluation.energy.n=99", {"energy": ...}),
        ("evaluation.reliability.bins=7", {"reliability": ...}),
        ("data.root=elsewhere", {"prepare": [""], "reliability": ...}),
        ("evaluation.attack.seed=3", {"attack": ..., "energy": ..., "reliability": ...}),
        ("evaluation.attack.protocols.standard.eps=0.111", {"attack": ..., "energy": ..., "reliability": ...}),
        ("evaluation.attack.protocols.released.eps=0.111", {"attack": ..., "reliability": ...}),
        ("evaluation.attack.protocols.released.n=3", {"attack": ...}),
        ("evaluation.attack.checks.restarts=2", {"attack": ...}),
    ],
)
def test_a_setting_changes_what_is_read_by_the_jobs_that_it_is_for(setting: str, jobs_of: dict[str, Any], profile: Profile) -> None:
    """And by the report, which shows all that determines a result. ...: those of every experiment."""
    other = load(ROOT / "params/digits.yaml", [str(ROOT / "params/overrides/ci.yaml"), setting])
    changed = {
        job.title for job in jobs.jobs(profile) if STAGES[job.stage].reads(profile, job.name) != STAGES[job.stage].reads(other, job.name)
    }
    assert jobs.jobs(other) == jobs.jobs(profile)
    names = {stage: profile.experiments if of is ... else of for stage, of in jobs_of.items()}
    expected = {jobs.Job(stage, name, 0 if name else "").title for stage, of in names.items() for name in of}
    assert changed - {"report"} == expected
    assert ("report" in changed) == (bool(expected) or "note" in setting)


def test_the_report_runs_again_with_every_file_that_its_pages_show(profile: Profile) -> None:
    read = jobs.inputs(profile, Layout("digits"), jobs.Job("report"))["results"]
    shown = {"finetune_curve.csv", "verdicts.parquet", "samples.png", "chains.gif", "energy.npz", "reliability.png"}
    assert {Path(file).name for file in read} == shown | {f"{stage}.json" for stage in jobs.measured(profile, "eb_jdat")}


@pytest.mark.parametrize("budget", registry.BUDGETS)
def test_a_training_holds_the_code_of_its_budget(budget: str) -> None:
    """Of every method, since each epoch makes it; scores only where there are neighbours."""
    settings = {"training": {"adversary": {"score": "ce", "budget": {"name": budget}}}}
    for method, others in (("pgd_at", [registry.SCORES["ce"]]), ("classifier", [])):
        found = [entry for entry in jobs.named({"method": method, **settings}) if entry not in registry.SAMPLES.values()]
        assert found == [registry.METHODS[method], *others, registry.BUDGETS[budget]]
    other = load(ROOT / "params/digits.yaml", [f"experiments.pgd_at.training.adversary.budget.name={budget}"])
    same = STAGES["finetune"].digest(load(ROOT / "params/digits.yaml"), "pgd_at") == STAGES["finetune"].digest(other, "pgd_at")
    assert same == (budget == "uniform")
