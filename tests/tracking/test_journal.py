"""Journals that are damaged, changed, too large or no files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ebjdat.tracking import journal
from ebjdat.tracking.publish import Outcome, Publisher

from .conftest import tracked

ABOUT = {"run": "r", "name": "n", "seed": 0, "stage": "s", "kind": "result", "id": "i", "dvc_exp": "", "host": "h"}
FIRST = {"time": 1, "begin": ABOUT, "params": {}, "tags": {}, "data": None}
DAMAGED = Path("results/f.journal.jsonl")


def lines(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps({"time": 1, **event}).encode() + b"\n" for event in events)


def published() -> Outcome:
    return Publisher("sqlite:///mlflow.db").publish(journal.finished())


@pytest.mark.parametrize(
    "content",
    [
        b"not JSON\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        lines({"time": "now"}),
        lines({"begin": 3}),
        lines({"end": "FINISHED"}),
        lines({**FIRST, "begin": {**ABOUT, "seed": "0"}}),
        lines({**FIRST, "begin": {**ABOUT, "id": ""}}),
        lines({**FIRST, "params": {"a": [1]}}),
        lines(FIRST, {"metrics": {"loss": "low"}, "step": 1}),
        lines(FIRST, {"metrics": [1], "step": 1}),
        lines(FIRST, {"metrics": {"loss": 1}, "step": "x"}),
        lines(FIRST, {"tag": "x"}),
        lines(FIRST, {"artifact": 3, "sha256": "x"}),
        lines(FIRST, {"result": {"name": "x"}}),
        lines(FIRST, {"end": "MAYBE"}),
        lines(FIRST, FIRST),
        lines(FIRST, {"end": "FINISHED", "sha256": "0" * 64}),
    ],
)
def test_a_damaged_journal_is_named_with_its_line(content: bytes) -> None:
    DAMAGED.parent.mkdir()
    DAMAGED.write_bytes(content)
    with pytest.raises(ValueError, match=r"^line [12]: "):
        journal.read(DAMAGED)
    (error,) = published().errors
    assert re.fullmatch(rf"{DAMAGED}: cannot be read \(line [12]: .*\); delete it if it is damaged", error)


def test_a_finished_journal_that_changed_is_told() -> None:
    """A digit of a number that became another, a line that is gone, the end that is, or everything."""
    with tracked(file="f") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 3.0}, 2)
    whole = DAMAGED.read_bytes()
    first, *rest = whole.splitlines(keepends=True)
    sealed = r"line \d: its sha256 does not match the lines before it"
    damages = {
        whole.replace(b"2.0", b"2.5"): sealed,
        first + b"".join(rest[1:]): sealed,
        whole[:-3]: "its last line does not say how its stage ended",
        whole[:40]: "its last line does not say how its stage ended",
        whole + whole: r"line \d: begins again",
    }
    for content, told in damages.items():
        DAMAGED.write_bytes(content)
        outcome = published()
        assert (outcome.journals, len(outcome.errors)) == (0, 1)
        assert re.fullmatch(rf"{DAMAGED}: cannot be read \({told}\); delete it if it is damaged", outcome.errors[0])
    DAMAGED.write_bytes(b"")
    assert published() == Outcome(notes=[f"{DAMAGED}: empty: its stage could not write it (a full disk?), or it was damaged"])
    DAMAGED.write_bytes(whole)
    assert published() == Outcome(journals=1)


def test_journals_of_earlier_versions_are_read() -> None:
    """They number the samples of the machine's load, and say where a killed stage went on."""
    DAMAGED.parent.mkdir()
    DAMAGED.write_bytes(lines(FIRST, {"system": {"a": 1.0}, "step": 0}, {"end": "KILLED"}, {"resumed": True}, {"end": "FINISHED"}))
    assert len(journal.read(DAMAGED)) == 5
    assert published() == Outcome(journals=1)


def test_a_journal_of_more_than_anybody_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = journal.UNFINISHED / "big.journal.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lines(FIRST, {}, {}, {}))
    assert len(journal.read(path)) == 4
    assert len(journal.read(path, limit=1)) == 1
    monkeypatch.setattr(journal, "MAX_LINES", 3)
    with pytest.raises(ValueError, match="more than 3 lines"):
        journal.read(path)
    os.truncate(path, journal.MAX_BYTES + 1)  # of zeros, which take no room
    with pytest.raises(ValueError, match="bytes; 67,108,864 are allowed"):
        journal.read(path)


def test_journals_that_are_no_files_are_left_alone() -> None:
    Path("results").mkdir()
    os.mkfifo("results/a.journal.jsonl")
    Path("results/b.journal.jsonl").symlink_to("/dev/zero")
    assert list(journal.finished()) == []
