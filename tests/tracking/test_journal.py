"""Journals that are damaged, changed, too large or no files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from ebjdat.tracking import journal
from ebjdat.tracking.publish import Publisher
from ebjdat.tracking.tracker import track

from .conftest import ABOUT, SUBJECT

BEGIN = {"time": 1, "begin": {"run": "r", "name": "n", "seed": 0, "stage": "s", "kind": "result", "id": "i", "dvc_exp": "", "host": "h"}}

BEGIN |= {"params": {}, "tags": {}, "data": None}


@pytest.mark.parametrize(
    "lines",
    [
        b"not JSON\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"time": "now"}\n',
        b'{"time": 1, "begin": 3}\n',
        b'{"time": 1, "end": "FINISHED"}\n',
        json.dumps({**BEGIN, "begin": {**BEGIN["begin"], "seed": "0"}}).encode() + b"\n",  # type: ignore[dict-item]
        json.dumps({**BEGIN, "params": {"a": [1]}}).encode() + b"\n",
        *(
            json.dumps(BEGIN).encode() + b"\n" + json.dumps({"time": 2, **event}).encode() + b"\n"
            for event in (
                {"metrics": {"loss": "low"}, "step": 1},
                {"metrics": [1], "step": 1},
                {"metrics": {"loss": 1}, "step": "x"},
                {"tag": "x"},
                {"artifact": 3, "sha256": "x"},
                {"result": {"name": "x"}},
                {"end": "MAYBE"},
                BEGIN,
                {"end": "FINISHED", "sha256": "0" * 64},
            )
        ),
    ],
)
def test_a_damaged_journal_is_named_with_its_line(lines: bytes) -> None:
    path = Path("results/bad.journal.jsonl")
    path.parent.mkdir()
    path.write_bytes(lines)
    with pytest.raises(ValueError, match=r"^line [12]: "):
        journal.read(path)
    outcome = Publisher("sqlite:///mlflow.db").publish(journal.finished())
    assert len(outcome.errors) == 1
    assert re.match(r"results/bad\.journal\.jsonl: cannot be read \(line [12]: .*\); delete it if it is damaged$", outcome.errors[0])


def test_a_finished_journal_that_changed_is_told() -> None:
    """A digit of a number that became another, a line that is gone, the end that is, or everything."""
    path = Path("results/f.journal.jsonl")
    with track(SUBJECT, ABOUT, path) as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 3.0}, 2)
    for unfinished in journal.unfinished():
        unfinished.unlink()
    whole = path.read_bytes()
    first, *rest = whole.splitlines(keepends=True)
    sealed = r"line \d: its sha256 does not match the lines before it"
    damages = {
        whole.replace(b"2.0", b"2.5"): sealed,
        first + b"".join(rest[1:]): sealed,
        whole[:-3]: "has no end",
        whole[:40]: "has no end",
        whole + whole: "begins again",
    }
    for content, told in damages.items():
        path.write_bytes(content)
        outcome = Publisher("sqlite:///mlflow.db").publish(journal.finished())
        assert (outcome.journals, len(outcome.errors)) == (0, 1)
        assert re.match(rf"{path}: cannot be read \(.*{told}\); delete it if it is damaged$", outcome.errors[0])
    path.write_bytes(b"")
    outcome = Publisher("sqlite:///mlflow.db").publish(journal.finished())
    assert (outcome.journals, outcome.errors) == (0, [])
    assert outcome.notes == [f"{path}: empty; its stage could write none when it ran, or it was damaged"]
    path.write_bytes(whole)
    assert Publisher("sqlite:///mlflow.db").publish(journal.finished()).journals == 1


def test_a_journal_of_more_than_anybody_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("big.journal.jsonl")
    path.write_bytes(json.dumps(BEGIN).encode() + b"\n" + b'{"time": 1}\n' * 3)
    assert len(journal.read(path)) == 4
    assert len(journal.read(path, limit=1)) == 1
    monkeypatch.setattr(journal, "MAX_LINES", 3)
    with pytest.raises(ValueError, match="more than 3 lines"):
        journal.read(path)
    with path.open("ab") as file:
        file.truncate(journal.MAX_BYTES + 1)  # of zeros, which take no room
    with pytest.raises(ValueError, match="bytes; 67,108,864 are allowed"):
        journal.read(path)


def test_journals_that_are_no_files_are_left_alone() -> None:
    Path("results").mkdir()
    os.mkfifo("results/a.journal.jsonl")
    Path("results/b.journal.jsonl").symlink_to("/dev/zero")
    assert list(journal.finished()) == []
