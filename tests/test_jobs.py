"""The table of stages: its files fit together, and its commands are ones that the command line takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import typer

from ebjdat import jobs
from ebjdat.cli import app
from ebjdat.layout import Layout
from ebjdat.settings import Profile, load

from .conftest import ROOT

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
        len({e.pretraining for e in profile.experiments.values()}) + 5 * len(profile.experiments)
    )


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


def test_what_is_read_changes_with_a_setting_of_the_job_alone(profile: Profile) -> None:
    """And where and how fast it runs changes nothing."""

    def changed(override: str) -> set[str]:
        other = load(ROOT / "params/digits.yaml", [str(ROOT / "params/overrides/ci.yaml"), override])
        return {job.title for job in jobs.jobs(profile) if jobs.depends_on(profile, job) != jobs.depends_on(other, job)}

    assert changed("runtime.threads=7") == set()
    assert changed("experiments.eb_jdat.training.weights.w2=0.123") == {"finetune-eb_jdat-seed0", "report"}
    assert changed("evaluation.generate.seed=12345") == {"report", *(f"generate-{e}-seed0" for e in profile.experiments)}
    assert changed("experiments.eb_jdat.note=another") == {"report"}
    assert changed("bases.jem.chain.steps=3") == set()  # no experiment inherits it
