"""Fixtures of the evaluation's tests."""

from __future__ import annotations

import numpy as np
import pytest

from ebjdat.data.prepared import Prepared

from ..conftest import Linear


@pytest.fixture
def linear() -> Linear:
    return Linear().eval()


@pytest.fixture(scope="module")
def flat(digits: Prepared) -> np.ndarray:
    """Pixels of every digit as features: float64 (1797, 64) in [0, 1]."""
    return digits.images.reshape(len(digits.images), -1) / 255.0
