"""Shared by tests of settings: the messages that a profile's problems make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebjdat.settings import ParamsError, load

from ..conftest import ROOT

DIGITS, FULL, CIFAR, FOLDER = (ROOT / f"params/{name}.yaml" for name in ("digits", "digits-full", "cifar10", "cifar10-folder"))
Refusal = Callable[..., str]


def nested(path: str, value: Any) -> dict[str, Any]:
    """("a.b", 1) -> {"a": {"b": 1}}"""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


@pytest.fixture
def raw() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(DIGITS.read_text())
    return content


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """(raw settings of a file mine.yaml, or overrides of digits) -> the message of ParamsError."""

    def message(settings: dict[str, Any] | list[str]) -> str:
        mine = tmp_path / "mine.yaml"
        mine.write_text(yaml.safe_dump(settings))
        with pytest.raises(ParamsError) as caught:
            load(mine) if isinstance(settings, dict) else load(DIGITS, settings)
        return str(caught.value)

    return message
