"""A disk that gets full at each write of each stage: one clear line, nothing half-written; with space again the same command goes on."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Campaign
from .judge import differences
from .lanes import Warm, clear_error, finished, outputs, warm
from .warm import FILLER

pytestmark = pytest.mark.torture

SIZE = "160m"
SAID = ("No space left on device", "Disk quota exceeded")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of its own. Raises PermissionError where nothing may be mounted."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_at_each_write(campaign: Campaign, runner: Warm, stage: str) -> None:
    """The stage, again and again, the disk full at the first write that has not met a full one yet."""
    lane, arguments = runner.lane, campaign.commands[stage]
    for name in outputs(arguments):
        (lane.folder / name).unlink()
    told = lane.folder.with_suffix(".told")  # beside the small disk
    seen: list[str] = []
    while not campaign.late():
        told.unlink(missing_ok=True)
        left = len(seen) % 2  # no page, or room for one: a larger file is then cut in its middle
        status = runner.call(arguments, {"do": "fill", "seen": seen, "told": str(told), "left": left})
        (lane.folder / FILLER).unlink(missing_ok=True)
        if not told.exists():
            break
        seen.append(told.read_text())
        said = lane.said()
        wrong = differences(campaign.whole, lane.folder, whole=False)
        how = "refused"
        if status:
            wrong += clear_error(said)
            wrong += [] if any(words in said for words in SAID) else [f"no word of a full disk: {said.strip()[-200:]}"]
        else:  # it had nothing left to write but its journal, or room for it
            stopped = "WARNING: tracking stops" in said
            how = "went on without its journal, and said so" if stopped else "nothing was left to write"
            wrong = [found for found in wrong if not (stopped and ".journal.jsonl" in found)]
            for name in outputs(arguments):
                (lane.folder / name).unlink(missing_ok=True)
        campaign.tally.add("disk", "full", f"{stage}: {seen[-1]}, {left} pages left", wrong, how)
    else:
        return
    wrong = clear_error(lane.said()) if status else []
    wrong += differences(campaign.whole, lane.folder)
    wrong += [f"no write of {name} was seen" for name in outputs(arguments) if not any(name in key for key in seen)]
    campaign.tally.add("disk", "full", f"{stage}: with space again", wrong, "went on to the same results")


def test_a_full_disk_at_each_write(campaign: Campaign) -> None:
    def work(part: list[str]) -> None:
        with small_disk(campaign.folder / f"disk-{part[0].split()[0]}") as disk, warm(finished(campaign.reference.folder, disk)) as runner:
            for stage in part:
                full_at_each_write(campaign, runner, stage)

    try:
        campaign.side_by_side(work, campaign.shares())
    except PermissionError as error:
        campaign.tally.skip("disk", "full", f"nothing may be mounted ({error})")
        pytest.skip(f"nothing may be mounted here ({error}); root may")
    assert not campaign.tally.failed("disk")
