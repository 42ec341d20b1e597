"""What the torture campaign judges by: a changed weight, verdict or number, half a file and a missing one are seen; seconds are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from .torture import judge
from .torture.judge import PROMISES, Tally, contents, differences, written_into
from .torture.lanes import clear_error, outputs
from .torture.warm import arm

WEIGHTS = {"model.head.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def checkpoint(path: Path, weights: dict[str, np.ndarray], seconds: float = 1.0) -> None:
    save_file(weights, path, {"ebjdat": json.dumps({"seed": 0, "metrics": {"finetune_seconds": seconds}, "digest": str(seconds)})})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("checkpoints", "results", "data"):
        (tmp_path / name).mkdir()
    checkpoint(tmp_path / "checkpoints/a.safetensors", WEIGHTS)
    pq.write_table(pa.table({"clean": [True, False], "autoattack": [True, None]}), tmp_path / "results/verdicts.parquet")
    (tmp_path / "results/attack.json").write_text('{"clean_acc": 0.5, "attack_seconds": 3.0, "files": {"a": "1"}, "sweep": [[0.1, 0.5]]}')
    (tmp_path / "results/summary.csv").write_text("experiment,clean_acc,train_seconds\na,0.5,3.0\n")
    (tmp_path / "results/table.md").write_text("| experiment | clean % | train s |\n|---|---|---|\n| a | 50.0 | 3.0 |\n")
    (tmp_path / "results/a.journal.jsonl").write_text('{"metrics": {"loss": 1.5}, "step": 1, "time": 5}\n{"end": "FINISHED", "time": 6}\n')
    (tmp_path / "results/report.html").write_text("<html>3.0 s</html>\n")
    np.savez(tmp_path / "data/data.npz", images=np.zeros((2, 4), np.uint8))
    return tmp_path


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one weight": (
        "checkpoints/a.safetensors differs",
        lambda f: checkpoint(f / "checkpoints/a.safetensors", {k: v + np.eye(2, 3, dtype=np.float32) * 1e-7 for k, v in WEIGHTS.items()}),
    ),
    "half a checkpoint": (
        "checkpoints/a.safetensors is not whole",
        lambda f: os.truncate(f / "checkpoints/a.safetensors", (f / "checkpoints/a.safetensors").stat().st_size - 1),
    ),
    "one verdict": (
        "results/verdicts.parquet differs",
        lambda f: pq.write_table(pa.table({"clean": [True, False], "autoattack": [False, None]}), f / "results/verdicts.parquet"),
    ),
    "one number": (
        "results/attack.json differs",
        lambda f: (f / "results/attack.json").write_text('{"clean_acc": 0.51, "attack_seconds": 3.0, "sweep": [[0.1, 0.5]]}'),
    ),
    "half a JSON": ("results/attack.json is not whole", lambda f: (f / "results/attack.json").write_text('{"clean_acc": 0.5')),
    "an empty table": ("results/summary.csv is not whole", lambda f: (f / "results/summary.csv").write_text("")),
    "one cell": (
        "results/summary.csv differs",
        lambda f: (f / "results/summary.csv").write_text("experiment,clean_acc,train_seconds\na,0.6,3.0\n"),
    ),
    "a cell of the shown table": (
        "results/table.md differs",
        lambda f: (f / "results/table.md").write_text("| experiment | clean % | train s |\n|---|---|---|\n| a | 60.0 | 3.0 |\n"),
    ),
    "a point that is there twice": (
        "results/a.journal.jsonl is not whole",
        lambda f: (f / "results/a.journal.jsonl").write_text((f / "results/a.journal.jsonl").read_text() * 2),
    ),
    "half a page": ("results/report.html is not whole", lambda f: (f / "results/report.html").write_text("<html>3.0")),
    "one pixel": ("data/data.npz differs", lambda f: np.savez(f / "data/data.npz", images=np.eye(2, 4, dtype=np.uint8))),
    "a file too many": ("results/b.json is not made", lambda f: (f / "results/b.json").write_text("{}")),
    "negative seconds": (
        "results/attack.json: seconds below 0",
        lambda f: (f / "results/attack.json").write_text('{"clean_acc": 0.5, "attack_seconds": -3.0, "sweep": [[0.1, 0.5]]}'),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_same_is_seen(change: str, folder: Path) -> None:
    reference = contents(folder)
    assert differences(reference, folder) == []
    says, make = CHANGES[change]
    make(folder)
    (found,) = differences(reference, folder)
    assert found.startswith(says)


def test_a_missing_file_is_seen_where_all_have_to_be_there(folder: Path) -> None:
    reference = contents(folder)
    (folder / "results/attack.json").unlink()
    assert differences(reference, folder) == ["results/attack.json is missing"]
    assert differences(reference, folder, whole=False) == []


def test_seconds_and_times_are_not_compared(folder: Path) -> None:
    reference = contents(folder)
    checkpoint(folder / "checkpoints/a.safetensors", WEIGHTS, seconds=2.0)
    (folder / "results/attack.json").write_text('{"clean_acc": 0.5, "attack_seconds": 4.0, "files": {"a": "2"}, "sweep": [[0.1, 0.5]]}')
    (folder / "results/summary.csv").write_text("experiment,clean_acc,train_seconds\na,0.5,4.0\n")
    (folder / "results/table.md").write_text("| experiment | clean % | train s |\n|---|---|---|\n| a | 50.0 | 4.0 |\n")
    (folder / "results/.attack.json.17.tmp.json").write_text("half")  # of a process that was killed
    assert differences(reference, folder) == []


def test_the_table_counts_and_the_page_carries_it() -> None:
    tally = Tally(seed=3)
    tally.add("kill", "snakemake", "a")
    tally.add("kill", "snakemake", "b", ["weights differ", "summary differs"])
    tally.add("damage", "JSON", "c", how="refused")
    tally.add("damage", "JSON", "d", how="refused")
    tally.skip("disk", "full", "nothing may be mounted")
    counts = {row[0]: row[3:] for row in tally.rows()}
    assert counts["kill: snakemake"] == ["2", "1", "1", ""]
    assert counts["damage: JSON"] == ["2", "2", "0", "2 refused"]
    assert counts["disk: full"] == ["0", "0", "0", "not tried here: nothing may be mounted"]
    assert counts["all"][:3] == ["4", "3", "1"]
    assert tally.failed("kill") == ["snakemake, b: weights differ; summary differs"]
    assert "FAILED  kill, snakemake, b: weights differ; summary differs" in tally.text()
    page = written_into(f"before\n{judge.BEGIN}\nold\n{judge.END}\nafter", tally)
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert "old" not in page
    assert "seed 3." in page
    assert f"| damage: JSON | {PROMISES['damage', 'JSON'][0]} |" in page
    assert json.loads(tally.as_json())["cases"][1]["outcome"] == "failed"
    with pytest.raises(AssertionError, match="what is promised"):
        tally.add("kill", "by hand", "x")


def test_the_page_is_one_that_the_campaign_can_write_into() -> None:
    page = (judge.ROOT / "docs/reliability.md").read_text()
    assert written_into(written_into(page, Tally(0)), Tally(0)).count(judge.BEGIN) == 1


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("error: results/a.json: damaged\n", []),
        ("WARNING: tracking stops\nerror: results/a.json: damaged\n", []),
        ("error: something\n", ["the error does not name the file", "error: something"]),
        ("Traceback (most recent call last):\n  x\nKeyError: 'a'\n", ["a traceback", "0 error lines", "KeyError: 'a'"]),
        ("killed\n", ["0 error lines", "killed"]),
    ],
)
def test_a_refusal_is_one_line_that_names_the_file(text: str, wrong: list[str]) -> None:
    assert clear_error(text, "a.json") == wrong


def test_what_a_command_declares_is_read_off_its_options() -> None:
    command = "energy --params p --samples in.npz --weights w --out r/energy.json --values r/energy.npz --figure r/energy.png"
    assert outputs(command.split()) == ["r/energy.json", "r/energy.npz", "r/energy.png", "r/energy.journal.jsonl"]
    command = "finetune --initial i --out c/seed0.safetensors --metrics r/finetune.json --curve r/finetune_curve.csv"
    assert outputs(command.split())[-1] == "r/finetune.journal.jsonl"


WRITES = """
import sys
from pathlib import Path
from {module} import arm
arm("kill", "told", sys.argv[1:])
Path("a.json").write_text("whole")
Path("b.json.tmp").write_text("whole")
Path("b.json.tmp").rename("b.json")
"""


def test_a_fault_strikes_at_each_write_in_turn(tmp_path: Path) -> None:
    """A file that is written in place is seen empty; one that is moved is not there yet."""
    seen: list[str] = []
    sizes = []
    while True:
        (tmp_path / "told").unlink(missing_ok=True)
        command = [sys.executable, "-c", WRITES.format(module=arm.__module__), *seen]
        ended = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(judge.ROOT)}, check=False).returncode
        if ended == 0:
            break
        assert ended == -9
        seen.append((tmp_path / "told").read_text())
        sizes.append({path.name: path.stat().st_size for path in tmp_path.glob("*.json*")})
    assert seen == ["open a.json 1", "open b.json.tmp 1", "move b.json 1"]
    assert sizes == [{"a.json": 0}, {"a.json": 5, "b.json.tmp": 0}, {"a.json": 5, "b.json.tmp": 5}]
    assert (tmp_path / "b.json").read_text() == "whole"
