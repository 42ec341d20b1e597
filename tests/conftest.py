"""Shared fixtures: small real data, small networks, and the project's own profile."""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet, build
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import DataSettings, ModelSettings, Profile, TrainingSettings, load

if TYPE_CHECKING:  # stages take a second to import
    from .chain import Chain

ROOT = Path(__file__).parents[1]


FIRST = (
    "workflow/test_versions",
    "workflow/test_two_tools",
    "workflow/test_box",
    "test_contributing",
    "training/test_step",
    "test_stages",
    "stages/test_",
    "training/test_",
    "evaluation/test_",
    "tracking/test_",
    "browser/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin, so that none of them is left for the end, when only one process is at work."""
    for item in items:
        for folder in ("workflow", "browser"):
            if f"tests/{folder}/" in item.nodeid:
                item.add_marker(folder)
        if "chain" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """`once(name, make)`: a folder that `make` fills once per run, also where several processes (pytest-xdist) share the tests."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / name, base / f"{name}-made"
        with (base / f"{name}-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.lstat() for path in folder.rglob("*") if not path.is_dir()}
    return {name: (status.st_mtime_ns, status.st_size) for name, status in found.items()}


@pytest.fixture(scope="session")
def chain(once: Once) -> Iterator[Chain]:
    """A small chain of results, not to be changed (`chain.py`)."""
    from .chain import Chain, make

    made = Chain(once("chain", make))
    before = stamps(made.folder)
    yield made
    assert stamps(made.folder) == before, "a test changed the chain that all share"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; nothing is sent to MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    return tmp_path


@pytest.fixture(scope="session")
def profile() -> Profile:
    return load(ROOT / "params/digits.yaml", [str(ROOT / "params/overrides/ci.yaml")])


@pytest.fixture(scope="session")
def digits() -> Prepared:
    return prepared.prepare(DataSettings(source="digits", test=497, validation=130))[0]


@pytest.fixture(scope="session")
def train_data(digits: Prepared) -> DeviceData:
    return DeviceData(digits, "train", torch.device("cpu"))


@pytest.fixture(scope="session")
def pool(digits: Prepared, train_data: DeviceData) -> StartPool:
    return StartPool.of(train_data, torch.from_numpy(digits.class_mean))


@pytest.fixture
def network() -> WideResNet:
    return build(ModelSettings(depth=10, width=1), channels=1, classes=10, seed=0)


@pytest.fixture
def settings(profile: Profile) -> TrainingSettings:
    return profile.training_settings("eb_jdat")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Linear(nn.Module):
    """Ten classes, logits linear in 4x4 pixels, so that the exact L-infinity robustness of an image is known."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 16, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T

    def robust_radius(self, x: Tensor, y: Tensor) -> Tensor:
        """min_j (f_y - f_j) / |w_y - w_j|_1: exact while the box [0, 1] does not bind."""
        margins = self(x)[range(len(x)), y][:, None] - self(x)
        lengths = (self.weight[y][:, None] - self.weight[None]).abs().sum(2)
        lengths[range(len(x)), y] = math.inf
        radius = margins / lengths
        radius[range(len(x)), y] = math.inf
        return radius.min(1).values
