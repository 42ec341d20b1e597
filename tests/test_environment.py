"""What is installed where: the lock file, the conda environment and pyproject agree, and no host is named."""

from __future__ import annotations

import re
import tomllib

import yaml
from packaging.requirements import Requirement

from .conftest import ROOT


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.match(r"^[a-z0-9_.-]+==[^ @/]+( ; .*)?$", line) for line in lines if line), "only pinned names"
    return {line.split("==")[0]: line.split("==")[1].split(" ")[0] for line in lines}


def test_lock_file_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = locked()
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_conda_environment_has_the_locked_versions() -> None:
    environment = yaml.safe_load((ROOT / "workflow/envs/ebjdat.yaml").read_text())
    pinned = dict(line.split("==") for line in environment["dependencies"][-1]["pip"])
    versions = locked()
    assert pinned == {name: versions[name] for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    assert set(pinned) == {Requirement(r).name for r in needed}
