"""The torture campaign: `make torture`, or `pytest -m torture tests/torture`. Not among the tests that run by default."""

from __future__ import annotations

import concurrent.futures
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from ebjdat.files import digest

from ..conftest import ROOT
from .judge import Tally, contents, written_into
from .lanes import Lane, made, stages

Item = TypeVar("Item")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torture")
    group.addoption("--torture-n", type=int, default=50, help="kills at random moments")
    group.addoption("--torture-seed", type=int, default=0, help="of the random moments, signals and bits")
    group.addoption("--torture-minutes", type=float, default=None, help="begin nothing new after so long; default: no limit")
    group.addoption("--torture-page", default=None, help="write the table into this page")


@dataclass
class Campaign:
    """What every category works with. reference: a checkout after an undisturbed run; whole: what that left behind."""

    tally: Tally
    reference: Lane
    whole: dict[str, str]
    commands: dict[str, list[str]]
    seconds: float  # that the undisturbed run took, on two cores
    folder: Path
    seed: int
    n: int
    deadline: float

    def random(self, *about: object) -> random.Random:
        return random.Random(f"{self.seed} {about}")

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def shares(self) -> list[list[str]]:
        """One of each kind of stage, in two parts of about the same work."""
        chosen = [stage for stage in self.commands if not stage.endswith(("classifier", "scratch"))]
        return [chosen[::2], chosen[1::2]]

    def side_by_side(self, work: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Two at a time."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, item) for item in items]:
                done.result()


def _reference(folder: Path) -> tuple[Lane, float, dict[str, list[str]]]:
    """An undisturbed run, how long it took, and its stages' commands; kept while neither code nor settings change."""
    code = sorted(path for part in ("src/ebjdat", "workflow", "params", "profiles") for path in (ROOT / part).rglob("*") if path.is_file())
    code = [path for path in code if "__pycache__" not in path.parts]
    place = folder / digest([str(path.relative_to(ROOT)) for path in code], ROOT / "Snakefile", *code)[:16]
    note = place / "note.json"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        place.mkdir(parents=True)
        lane = made(place / "checkout")
        began = time.monotonic()
        lane.run("snakemake", "--cores", "2")
        note.write_text(json.dumps([time.monotonic() - began, stages(lane)]))
    return Lane(place / "checkout"), *json.loads(note.read_text())


@pytest.fixture(scope="session")
def campaign(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    # A campaign in the background of a shell ignores Ctrl-C; what it starts must not inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    seed, minutes = pytestconfig.getoption("--torture-seed"), pytestconfig.getoption("--torture-minutes")
    tally = Tally(seed)
    pytestconfig.stash[TALLY] = tally
    reference, seconds, commands = _reference(ROOT / "build/torture/reference")
    print(f"\nseed {seed}; an undisturbed run took {seconds:.0f} s", flush=True)
    return Campaign(
        tally,
        reference,
        contents(reference.folder),
        commands,
        seconds,
        tmp_path_factory.mktemp("torture"),
        seed,
        pytestconfig.getoption("--torture-n"),
        began + (60 * minutes if minutes else float("inf")),
    )


TALLY = pytest.StashKey[Tally]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(TALLY, None)
    if tally is None:
        return
    terminalreporter.section(f"torture, seed {tally.seed}")
    terminalreporter.write_line(tally.text())
    out = ROOT / "build/torture"
    (out / "last.json").write_text(tally.as_json())
    (out / "last.md").write_text(tally.markdown() + "\n")
    terminalreporter.write_line(f"each case: {(out / 'last.json').relative_to(ROOT)}; the table: {(out / 'last.md').relative_to(ROOT)}")
    if name := config.getoption("--torture-page"):
        page = ROOT / name
        page.write_text(written_into(page.read_text(), tally))
        terminalreporter.write_line(f"written into {name}")
