"""A copy of the project with a tiny profile, in which the real programs run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ebjdat.settings import merge

from ..conftest import ROOT, Once
from . import warm

TINY = {
    "data": {"n_train": 130, "n_test": 40},
    "training": {"batch_size": 32},
    "evaluation": {
        "attack": {
            "protocols": {name: {"n": 0} for name in ("standard", "released", "standard_l2")},
            "checks": {"n": 10, "steps": 2, "restarts": 1},
        },
        "generate": {"n": 40},
    },
}


@dataclass(frozen=True)
class Project:
    """A checkout. `run` runs a program of the environment there and returns its output."""

    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "DVC", "MLFLOW"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"),
            "EBJDAT_TRACKING": "0",
            "DVC_SITE_CACHE_DIR": str(self.folder.parent / "dvc"),  # else in /var/tmp, for good
            **more,
        }

    def run(self, *command: str, ok: bool = True, **environment: str) -> str:
        made = self.environment(**environment)
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**made, "PATH": f"{warm.programs()}:{made['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not ok or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
        return done.stdout

    def copy(self, folder: Path) -> Project:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)

    def planned(self, *options: str) -> dict[str, int]:
        """Jobs that Snakemake would run, by rule."""
        return self.jobs(self.plan(*options))

    def plan(self, *options: str) -> str:
        return self.run("snakemake", "--dry-run", "--cores", "2", *options)

    @staticmethod
    def jobs(text: str) -> dict[str, int]:
        """The table of jobs in what Snakemake said."""
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", text, re.M | re.S)
        return {line.split()[0]: int(line.split()[1]) for line in table[1].splitlines()} if table else {}

    @staticmethod
    def targets(plan: str) -> set[str]:
        """Outputs of the jobs that Snakemake would run."""
        return {name for line in re.findall(r"^    output: (.*)$", plan, re.M) for name in line.split(", ")}

    def status(self) -> dict[str, object]:
        """Stages that DVC would run, and why, once its first stage has written what they depend on."""
        self.run("dvc", "repro", "digests")
        found = json.loads(self.run("dvc", "status", "--json"))
        assert found["digests"] == ["always changed"]
        return {stage: why for stage, why in found.items() if why != ["always changed"]}

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / "src/ebjdat" / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def change(self, **content: object) -> None:
        file = self.folder / "params/digits.yaml"
        file.write_text(yaml.safe_dump(merge(yaml.safe_load(file.read_text()), content), sort_keys=False))


def checkout(folder: Path, *experiments: str) -> Project:
    """A copy of the project with these experiments of one epoch each; a git and DVC repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    layers = [yaml.safe_load((ROOT / name).read_text()) for name in ("params/digits.yaml", "params/overrides/ci.yaml")]
    content = merge({}, *layers, TINY)
    content["experiments"] = {name: content["experiments"][name] for name in experiments}
    content["pretraining"] = {name: content["pretraining"][name] for name in {e["pretraining"] for e in content["experiments"].values()}}
    (folder / "params/digits.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    made = Project(folder)
    made.run("git", "init", "-q", "-b", "main")
    for key, value in (("user.name", "t"), ("user.email", "t@t.example")):
        made.run("git", "config", key, value)
    made.run("python", "workflow/scripts/dvc_stages.py")
    made.commit("start")
    return made


def ran(text: str) -> set[str]:
    """Stages that `dvc repro` ran."""
    return {name for name in re.findall(r"Running stage '([^']+)'", text) if name.split(":")[-1] != "digests"}


@pytest.fixture(scope="session")
def made_by_snakemake(once: Once) -> Project:
    """Two experiments that share nothing but the data, and all their results. Not to be changed."""

    def make(folder: Path) -> None:
        checkout(folder / "checkout", "classifier", "eb_jdat").run("snakemake", "--cores", "2")

    return Project(once("snakemake", make) / "checkout")


@pytest.fixture(scope="session")
def made_by_dvc(once: Once) -> Project:
    """`dvc repro` has made everything, its dvc.lock is committed, and a folder beside it is the DVC remote. Not to be changed."""

    def make(folder: Path) -> None:
        made = checkout(folder / "checkout", "classifier")
        assert len(ran(made.run("dvc", "repro"))) == 1 + 1 + 5 + 1
        made.run("dvc", "remote", "add", "--default", "beside", str(folder / "remote"))
        made.run("dvc", "push")
        made.commit("results")

    return Project(once("dvc", make) / "checkout")


@pytest.fixture
def after_snakemake(made_by_snakemake: Project, tmp_path: Path) -> Project:
    return made_by_snakemake.copy(tmp_path / "checkout")


@pytest.fixture
def after_dvc(made_by_dvc: Project, tmp_path: Path) -> Project:
    return made_by_dvc.copy(tmp_path / "checkout")
