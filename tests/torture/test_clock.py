"""A clock that jumps, between and during stages, changes no result; files dated ahead or back are not taken for others without a word."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from .conftest import Campaign
from .judge import declared, differences
from .lanes import Lane, finished, outputs, wait_for

pytestmark = pytest.mark.torture

DAY = 86_400
LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib/faketime/libfaketime.so.1", "/usr/local/lib/faketime/libfaketime.so.1")


def library() -> Path | None:
    return next((found for pattern in LIBRARIES for found in Path("/").glob(pattern.removeprefix("/"))), None)


def stage_under_a_jumping_clock(campaign: Campaign, jumps: tuple[float, ...]) -> None:
    """Trained in parts, killed after each: under each part the clock begins at another day, and jumps back by it in the middle."""
    lane = finished(campaign.reference.folder, campaign.folder / f"clock{'_'.join(f'{j:+g}' for j in jumps)}")
    arguments = campaign.commands["finetune eb_jdat"]
    for name in outputs(arguments):
        (lane.folder / name).unlink()
    shown = lane.folder.with_suffix(".clock")
    clock = {
        "LD_PRELOAD": str(library()),
        "FAKETIME_TIMESTAMP_FILE": str(shown),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # a real clock that is set leaves it alone, too
        "NO_FAKE_STAT": "1",
    }
    wrong = []
    for i, days in enumerate(jumps):
        last = i + 1 == len(jumps)
        shown.write_text(f"{days * DAY:+.0f}")
        process = lane.start(sys.executable, "-m", "ebjdat", *arguments, **clock)
        state = lane.folder / "state/digits/eb_jdat"
        wait_for(lambda process=process, state=state: bool(list(state.rglob("*.pt"))) or process.poll() is not None, 600)
        shown.write_text(f"{-days * DAY:+.0f}")  # while it runs
        if not last:
            process.send_signal(signal.SIGTERM)
        status = process.wait(600)
        if last and status:
            wrong.append(f"ended with {status}: {lane.said().strip()[-200:]}")
    wrong += differences(campaign.whole, lane.folder)
    campaign.tally.add("clock", "stage", f"days {', '.join(f'{j:+g}' for j in jumps)}", wrong)
    shutil.rmtree(lane.folder)


def dated(campaign: Campaign, which: str, days: float) -> None:
    """Results dated days ahead or back, as by a clock that was set in between; then `snakemake`."""
    lane = finished(campaign.reference.folder, campaign.folder / f"dated-{which}{days:+g}")
    for path in declared(lane.folder):
        if which in str(path):
            file = lane.folder / path
            stamp = file.stat().st_mtime + days * DAY
            os.utime(file, (stamp, stamp))
    planned = lane.planned()
    status = lane.call("snakemake", "--cores", "1")
    said = lane.said()
    wrong = [] if status == 0 else [f"ended with {status}: {said.strip()[-300:]}"]
    wrong += differences(campaign.whole, lane.folder)
    ran = Lane.jobs(said)
    again = lane.planned()
    wrong += [f"runs again and again: {again}"] if again else []
    how = "nothing ran again" if not ran else f"said that it ran {sum(ran.values())} jobs again"
    wrong += ["ran other jobs than it had planned"] if planned != ran else []
    campaign.tally.add("clock", "files", f"{which or 'all'} {days:+g} days", wrong, how)
    shutil.rmtree(lane.folder)


def test_clocks_that_jump(campaign: Campaign) -> None:
    tried = [(3.0, -400.0), (-3.0, 1.0), (400.0,), (-400.0,)]
    if library() is None:
        campaign.tally.skip("clock", "stage", "libfaketime is not installed: apt-get install faketime")
    work = [lambda jumps=jumps: stage_under_a_jumping_clock(campaign, jumps) for jumps in tried if library() is not None]
    kinds = [("", 2), ("", -2), ("finetune", 2), ("checkpoints", -2), ("data.npz", 2), ("energy", -2)]
    work += [lambda which=which, days=days: dated(campaign, which, days) for which, days in kinds]
    campaign.side_by_side(lambda each: None if campaign.late() else each(), work)
    assert not campaign.tally.failed("clock")
