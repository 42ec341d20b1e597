"""DVC's lock file: what it names, and one clear line where it is damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..conftest import ROOT

sys.path.append(str(ROOT / "workflow/scripts"))
import dvc_results

NO_DVC_LOCKS = [
    "<<<<<<< HEAD\n",
    "[1, 2]",
    "stages: 3",
    "stages: {a: [b]}",
    "stages: {a: {outs: [path]}}",
    "stages: {a: {outs: [{md5: 1}]}}",
]


@pytest.mark.parametrize("text", [*NO_DVC_LOCKS, "[" * 2000])
def test_a_damaged_dvc_lock_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert dvc_results.locked_outputs("digits") == {}  # no file
    Path("dvc.lock").write_text(text)
    with pytest.raises(dvc_results.DvcError, match=r"^dvc\.lock: not as DVC writes it"):
        dvc_results.locked_outputs("digits")


def test_what_a_dvc_lock_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - {path: y, md5: 0f, size: 3}\n  b: {cmd: z}\n")
    assert dvc_results.locked_outputs("digits") == {"a": {"y": "0f"}, "b": {}}
