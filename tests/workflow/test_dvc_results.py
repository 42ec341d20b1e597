"""Damaged files of DVC: one clear line each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT

sys.path.append(str(ROOT / "workflow/scripts"))
import dvc_results

LOCKS = {
    "no process": '{"write": {"/a": {"cmd": "dvc repro"}}, "read": {}}',
    "a reader without a process": '{"read": {"/a": [{"cmd": "snakemake"}]}}',
    "a process that is text": '{"write": {"/a": {"pid": "12", "cmd": "dvc"}}}',
    "an impossible process": '{"write": {"/a": {"pid": 99999999999999999999, "cmd": "dvc"}}}',
    "no command": '{"write": {"/a": {"pid": 1}}}',
    "a list": "[]",
    "lists inside": '{"write": [1], "read": 3}',
    "a holder that is text": '{"write": {"/a": "x"}}',
    "cut": '{"write": {',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("what", LOCKS)
def test_dvcs_lock_file_that_is_damaged_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    dvc_results.RUNNING.parent.mkdir(parents=True)
    dvc_results.RUNNING.write_text(LOCKS[what])
    with pytest.raises(dvc_results.DvcError, match=r"^\.dvc/tmp/rwlock: not as DVC writes it \(.*\); .* delete the file and run again$"):
        dvc_results.refuse_beside_dvc()


def test_dvcs_lock_file_of_a_living_process_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dvc_results.refuse_beside_dvc()  # no file
    dvc_results.RUNNING.parent.mkdir(parents=True)
    dvc_results.RUNNING.write_text(json.dumps({"write": {"/a": {"pid": os.getppid(), "cmd": "dvc repro"}}}))
    with pytest.raises(dvc_results.BusyError, match="`dvc repro`"):
        dvc_results.refuse_beside_dvc()


NO_DVC_LOCKS = [
    "<<<<<<< HEAD\n",
    "[1, 2]",
    "stages: 3",
    "stages: {a: [b]}",
    "stages: {a: {outs: [path]}}",
    "stages: {a: {outs: [{md5: 1}]}}",
]


@pytest.mark.parametrize("text", [*NO_DVC_LOCKS, "[" * 2000])
def test_a_dvc_lock_that_is_none_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert dvc_results.locked_outputs("digits") == {}  # no file
    Path("dvc.lock").write_text(text)
    with pytest.raises(dvc_results.DvcError, match=r"^dvc\.lock: not as DVC writes it"):
        dvc_results.locked_outputs("digits")


def test_what_a_dvc_lock_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - {path: y, md5: 0f, size: 3}\n  b: {cmd: z}\n")
    assert dvc_results.locked_outputs("digits") == {"a": {"y": "0f"}, "b": {}}
