"""Fixtures of the evaluation's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.samplers.starts import StartPool

from ..conftest import Linear


@pytest.fixture
def linear() -> Linear:
    return Linear().eval()


@pytest.fixture
def pool(digits: Prepared, train_data: DeviceData) -> StartPool:
    return StartPool.of(train_data, torch.from_numpy(digits.class_mean))


@pytest.fixture(scope="module")
def flat(digits: Prepared) -> np.ndarray:
    """Pixels of every digit as features: float64 (1797, 64) in [0, 1]."""
    return digits.images.reshape(len(digits.images), -1) / 255.0
