"""Fixtures of the models' tests."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from .somebodys import FACTORIES


@pytest.fixture(autouse=True)
def somebodys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("somebodys")
    vars(module).update(FACTORIES)
    monkeypatch.setitem(sys.modules, "somebodys", module)
    monkeypatch.chdir(tmp_path)
