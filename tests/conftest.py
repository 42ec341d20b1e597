"""Shared fixtures: small real data, small networks, and the project's own profile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ebjdat import params
from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet, build
from ebjdat.params import DataSettings, ModelSettings, Profile, TrainingSettings

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def profile() -> Profile:
    return params.load(ROOT / "params/digits.yaml", [str(ROOT / "params/overrides/ci.yaml")])


@pytest.fixture(scope="session")
def digits() -> Prepared:
    return prepared.prepare(DataSettings(source="digits", test=497, validation=130))[0]


@pytest.fixture(scope="session")
def train_data(digits: Prepared) -> DeviceData:
    return DeviceData(digits, "train", torch.device("cpu"))


@pytest.fixture
def network() -> WideResNet:
    return build(ModelSettings(depth=10, width=1), channels=1, classes=10, seed=0)


@pytest.fixture
def settings(profile: Profile) -> TrainingSettings:
    return profile.training_settings("eb_jdat")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
