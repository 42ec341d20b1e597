"""A copy of the project with a tiny profile, in which the real programs run."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from ebjdat.settings import merge

from ..conftest import ROOT
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


@cache
def warm_python() -> Path:
    """The folder of a `python` that starts `python -m ebjdat` sooner; what serves it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="ebjdat-warm-"))
    atexit.register(shutil.rmtree, folder)
    server = subprocess.Popen(
        [sys.executable, "-P", str(Path(warm.__file__)), str(folder / "asked")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    warm.client(folder / "bin", folder / "asked")
    return folder / "bin"


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
            **more,
        }

    def run(self, *command: str, ok: bool = True, **environment: str) -> str:
        made = self.environment(**environment)
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**made, "PATH": f"{warm_python()}:{made['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not ok or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
        return done.stdout

    def planned(self, *options: str) -> dict[str, int]:
        """Jobs that Snakemake would run, by rule."""
        return self.jobs(self.run("snakemake", "--dry-run", "--cores", "2", *options))

    @staticmethod
    def jobs(text: str) -> dict[str, int]:
        """The table of jobs in what Snakemake said."""
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", text, re.M | re.S)
        return {line.split()[0]: int(line.split()[1]) for line in table[1].splitlines()} if table else {}

    def planned_targets(self) -> set[str]:
        """Outputs of the jobs that Snakemake would run."""
        text = self.run("snakemake", "--dry-run", "--cores", "2")
        return {name for line in re.findall(r"^    output: (.*)$", text, re.M) for name in line.split(", ")}

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


@pytest.fixture(scope="package")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two experiments that share nothing but the data."""
    return checkout(tmp_path_factory.mktemp("project") / "checkout", "classifier", "eb_jdat")
