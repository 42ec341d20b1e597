"""What is installed where: the lock file, the conda environment and pyproject agree, and no host is named."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from .conftest import ROOT

PYTHONS = ("3.11", "3.12", "3.13")


def locked(python: str) -> dict[str, str]:
    """Distribution -> the version that the lock file has for this Python on Linux."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line]
    assert all(re.match(r"^[a-z0-9_.-]+==[^ @/]+( ; .*)?$", line) for line in lines), "only pinned names"
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_machine": "x86_64"}
    chosen = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(machine)]
    found = {r.name: str(r.specifier).removeprefix("==") for r in chosen}
    assert len(found) == len(chosen), "one version of each"
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_file_satisfies_pyproject(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = locked(python)
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_conda_environment_has_the_locked_versions_for_its_python() -> None:
    environment = yaml.safe_load((ROOT / "workflow/envs/ebjdat.yaml").read_text())
    (python,) = (line.partition("=")[2] for line in environment["dependencies"] if str(line).startswith("python="))
    assert python in PYTHONS
    pinned = dict(line.split("==") for line in environment["dependencies"][-1]["pip"])
    versions = locked(python)
    assert pinned == {name: versions[name] for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    assert set(pinned) == {Requirement(r).name for r in needed}


def test_the_lock_file_has_other_numpys_for_other_pythons() -> None:
    """So that the test above compares with the right line: the later ones need Python 3.12."""
    assert locked("3.11")["numpy"] != locked("3.12")["numpy"]
