"""Result files that tests may change, made once and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ebjdat.report.collect import RunResult, collect
from ebjdat.settings import Profile, load

from ..conftest import ROOT
from .results import fill


@pytest.fixture(scope="session")
def three_seeds() -> Profile:
    return load(ROOT / "params/digits.yaml", ["seeds=[0, 1, 2]"])


@pytest.fixture(scope="session")
def made(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the small profile, one seed. Not to be changed."""
    return fill(profile, tmp_path_factory.mktemp("results") / "digits")


@pytest.fixture(scope="session")
def made_three(three_seeds: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of three seeds. Not to be changed."""
    return fill(three_seeds, tmp_path_factory.mktemp("results") / "three")


@pytest.fixture
def filled(made: Path, tmp_path: Path) -> Path:
    """The results of one seed, to be changed."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def filled_three(made_three: Path, tmp_path: Path) -> Path:
    """Those of three seeds, to be changed."""
    return Path(shutil.copytree(made_three, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def runs(profile: Profile, made: Path) -> list[RunResult]:
    return collect(profile, made, "d1")


@pytest.fixture
def three_runs(three_seeds: Profile, made_three: Path) -> list[RunResult]:
    return collect(three_seeds, made_three, "d1")
