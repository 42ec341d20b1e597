"""What runs left behind, compared bit for bit; and the table of what was tried, survived and failed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

from ..conftest import ROOT

MADE = ("data", "checkpoints", "results")
BEGIN, END = "<!-- torture: this table is written by `make torture` -->", "<!-- torture: end -->"


def without_seconds(value: Any) -> Any:
    """JSON without what a clock measured, and without the digests that are taken over it."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.endswith("seconds") and k not in ("digest", "files", "sha256")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    return json.dumps(without_seconds(value), sort_keys=True)


def _array(value: np.ndarray[Any, Any]) -> str:
    return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"


def _columns(rows: list[list[str]]) -> str:
    """A table without the columns that a clock measured."""
    kept = [i for i, head in enumerate(rows[0]) if "seconds" not in head and head.strip() != "train s"]
    assert all(len(row) == len(rows[0]) for row in rows), "rows of different lengths"
    return json.dumps([[row[i] for i in kept] for row in rows])


def _journal(text: str) -> str:
    """What a finished journal says: each point of the curves and each final value, once, and how it ended."""
    events = [json.loads(line) for line in text.splitlines()]
    points = [[event["step"], without_seconds(event["metrics"])] for event in events if "metrics" in event]
    assert len({step for step, _ in points}) == len(points), "a step is journalled twice"
    finals = [event["final"] for event in events if "final" in event]
    return _text([points, finals, events[-1].get("end")])


def content(path: Path) -> str:
    """What a file says, as text: equal for equal results, whatever a clock measured. Raises for a file that is not whole."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            header = json.loads(file.metadata()["ebjdat"])
            tensors = {name: _array(file.get_tensor(name)) for name in sorted(file.keys())}
        return _text([{k: v for k, v in header.items() if k not in ("tensors", "run")}, tensors])  # (run: how it was called)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return _text({name: _array(arrays[name]) for name in sorted(arrays)})
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return _text([table.to_pydict(), json.loads((table.schema.metadata or {}).get(b"ebjdat", b"{}"))])
    if path.suffix == ".json":
        return _text(json.loads(path.read_text()))
    if path.suffix == ".csv":
        return _columns(list(csv.reader(io.StringIO(path.read_text()))))
    if path.suffix == ".jsonl":
        return _journal(path.read_text())
    if path.name == "table.md":
        return _columns([line.split("|") for line in path.read_text().splitlines() if line.startswith("|")])
    if path.suffix == ".html":  # says seconds in many places; its numbers are those of summary.csv
        assert path.read_text().rstrip().endswith("</html>"), "no end"
        return "a whole page"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def declared(folder: Path) -> list[Path]:
    """Every file that stages declare, as paths within the folder; temporary ones are hidden."""
    found = (path for part in MADE for path in (folder / part).rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder) for path in found)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): content(folder / path) for path in declared(folder)}


def differences(reference: Mapping[str, str], folder: Path, whole: bool = True) -> list[str]:
    """How a folder's files differ from an undisturbed run's. whole: all of them have to be there; else those that are."""
    wrong = []
    names = {str(path) for path in declared(folder)}
    if whole:
        wrong += [f"{name} is missing" for name in sorted(reference.keys() - names)]
    for name in sorted(names):
        try:
            found = content(folder / name)
        except Exception as error:  # whatever a reader says of half a file
            if not whole and not (folder / name).exists():
                continue  # deleted just now, by a process that outlived a kill
            wrong.append(f"{name} is not whole ({type(error).__name__}: {str(error)[:80]})")
            continue
        if name not in reference:
            wrong.append(f"{name} is not made by an undisturbed run")
        elif found != reference[name]:
            wrong.append(f"{name} differs")
    return wrong + [f"{name}: seconds below 0" for name in sorted(names) if _backwards(folder / name)]


def _backwards(path: Path) -> bool:
    """Whether a file of results holds a negative time."""
    if path.suffix != ".json":
        return False
    try:
        text = path.read_text()
    except (OSError, UnicodeError):
        return False
    return re.search(r'seconds": -', text) is not None


# --- the table -------------------------------------------------------------------------------------------------------

# (category, kind) -> what is promised, and how it is tried. A kind that is not here cannot be recorded.
PROMISES: dict[tuple[str, str], tuple[str, str]] = {
    ("kill", "snakemake"): (
        "after a kill the same command goes on (`make unlock` after `kill -9`) and ends with the same bits",
        "SIGKILL, SIGTERM or SIGINT for `snakemake` itself, its process group or one of its jobs, at random moments",
    ),
    ("kill", "dvc repro"): ("the same through DVC", "such signals while `dvc repro` runs stages"),
    ("kill", "record"): ("what DVC has recorded is whole and current", "such signals while the results are recorded (`dvc commit`)"),
    ("kill", "at a write"): (
        "no file is ever half-written",
        "SIGKILL at each write of each stage once: training state, checkpoint, attack state, results, journal, pictures, report",
    ),
    ("kill", "in a write"): (
        "no state and no checkpoint is ever half-written",
        "SIGKILL a random moment after a file under state/ or checkpoints/ begins to change",
    ),
    ("disk", "full"): (
        "a full disk ends in one clear line; nothing half-written is taken for whole; then the same command goes on",
        "a tmpfs that is full at each write of each stage once, or has room for a part of the file",
    ),
    ("damage", "checkpoint"): ("a damaged checkpoint is refused", "bits flipped, cut short, emptied, doubled; then a stage reads it"),
    ("damage", "training state"): ("a damaged state is refused or not used", "the same, in the middle of a training"),
    ("damage", "attack state"): ("a damaged state is refused or not used", "the same, in the middle of an evaluation"),
    ("damage", "arrays"): ("damaged prepared data, samples, energies are refused", "the same, for each .npz that a stage reads"),
    ("damage", "JSON"): ("no damaged number reaches the report", "the same, for each stage's results and the data card"),
    ("damage", "tables"): ("no damaged verdict reaches the report", "the same, for verdicts.parquet and the CSV files that are read"),
    ("damage", "pictures"): ("a damaged picture is refused, or shown as it is", "the same, for the pictures that the report embeds"),
    ("damage", "journals"): ("a damaged journal costs a word, not a run", "the same, for journals that a stage or `ebjdat sync` reads"),
    ("damage", "settings"): ("damaged settings are refused, or are other settings, under another hash", "the same, for a profile"),
    ("damage", "images"): (
        "damaged images are refused by name, or are other data, under another hash",
        "the same, for a folder and archives",
    ),
    ("damage", "stores"): ("a damaged mlflow.db or dvc.lock is said in one line", "the same; then `ebjdat sync`, `snakemake`"),
    ("mlflow", "server"): (
        "tracking never stops a training; journals are kept, and `ebjdat sync` sends each value once",
        "a server that is down, slow, hangs, answers 500, loses answers, dies, or answers without end",
    ),
    ("clock", "stage"): (
        "a clock that jumps changes no result; seconds are never below 0",
        "days forward and back, between and during stages",
    ),
    ("clock", "files"): ("nothing runs again, or is kept, without a word", "results dated days ahead or back; then `snakemake`"),
}


@dataclass(frozen=True)
class Case:
    """One thing that was tried. outcome: "survived", "failed" or "skipped"; how: in which way, in a few words."""

    category: str
    kind: str
    name: str
    outcome: str
    how: str = ""


@dataclass
class Tally:
    """All that was tried. Safe to be told from several threads."""

    seed: int
    cases: list[Case] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def add(self, category: str, kind: str, name: str, wrong: Iterable[str] = (), how: str = "") -> Case:
        """wrong: what is not as it should be; nothing of it: survived."""
        assert (category, kind) in PROMISES, f"{category}, {kind}: what is promised?"
        told = "; ".join(wrong)
        case = Case(category, kind, name, "failed" if told else "survived", told or how)
        with self._lock:
            self.cases.append(case)
            print(
                f"[{time.strftime('%H:%M:%S')}] {category}, {kind}, {name}: {case.outcome}{' (' + case.how + ')' if case.how else ''}",
                flush=True,
            )
        return case

    def skip(self, category: str, kind: str, why: str) -> None:
        with self._lock:
            self.cases.append(Case(category, kind, "all", "skipped", why))

    def failed(self, category: str) -> list[str]:
        return [f"{c.kind}, {c.name}: {c.how}" for c in self.cases if (c.category, c.outcome) == (category, "failed")]

    def rows(self) -> list[list[str]]:
        """Heads, then a line per category and kind, then all together."""
        lines = [["", "promised", "how it is tried", "tried", "survived", "failed", "in which way"]]
        for (category, kind), (promised, how) in PROMISES.items():
            mine = [case for case in self.cases if (case.category, case.kind) == (category, kind)]
            if mine:
                lines.append([f"{category}: {kind}", promised, how, *self._counts(mine)])
        return [*lines, ["all", "", "", *self._counts(self.cases)]]

    @staticmethod
    def _counts(cases: list[Case]) -> list[str]:
        skipped = sorted({case.how for case in cases if case.outcome == "skipped"})
        ways = Counter(case.how for case in cases if case.outcome == "survived" and case.how)
        told = [f"{n} {way}" for way, n in ways.most_common()] + [f"not tried here: {why}" for why in skipped]
        n = {outcome: sum(case.outcome == outcome for case in cases) for outcome in ("survived", "failed")}
        return [str(sum(n.values())), str(n["survived"]), str(n["failed"]), ", ".join(told)]

    def markdown(self) -> str:
        heads, *lines = self.rows()
        lines[-1][-1] = ""
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *lines])

    def text(self) -> str:
        """For a terminal: what was tried and how it ended, without the promises; then each failure."""
        lines = [[row[0], *row[3:6]] for row in self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        failures = [f"FAILED  {c.category}, {c.kind}, {c.name}: {c.how}" for c in self.cases if c.outcome == "failed"]
        skipped = [f"skipped {c.category}, {c.kind}: {c.how}" for c in self.cases if c.outcome == "skipped"]
        return "\n".join([*table, *skipped, *failures])

    def as_json(self) -> str:
        return json.dumps({**about(), "seed": self.seed, "cases": [asdict(case) for case in self.cases]}, indent=1) + "\n"


def about() -> dict[str, str]:
    """Where and when: the machine's kind, not its name."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len({line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")})
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": f"{cores} cores of {model[1] if model else platform.machine()}, Python {platform.python_version()}",
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def written_into(page: str, tally: Tally) -> str:
    """The page with the table, and what it was made on, between its two marks."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    assert found, f"the page has no {BEGIN}"
    assert closed, f"the page has no {END}"
    told = about()
    line = f"Last run: {told['date']}, commit {told['commit']}, {told['machine']}, seed {tally.seed}."
    return f"{before}{BEGIN}\n\n{line}\n\n{tally.markdown()}\n\n{END}{after}"
