"""A disk that gets full at each write of each stage: one clear line, nothing half-written; with space again the same command goes on."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Campaign
from .judge import differences
from .lanes import Lane, clear_error, finished, outputs, warm
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


def full_at_each_write(campaign: Campaign, lane: Lane, stage: str) -> None:
    """The stage, again and again, the disk full at the first write that has not met a full one yet."""
    arguments = campaign.commands[stage]
    for name in outputs(arguments):
        (lane.folder / name).unlink(missing_ok=True)
    told = lane.folder.with_suffix(".told")  # beside the small disk
    seen: list[str] = []
    with warm(lane) as runner:
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
                how = "went on without its journal, and said so" if "WARNING: tracking stops" in said else "nothing was left to write"
                # a journal that was cut is said above; it is made again below
                for name in outputs(arguments):
                    (lane.folder / name).unlink(missing_ok=True)
                wrong = [w for w in wrong if ".journal.jsonl" not in w]
            campaign.tally.add("disk", "full", f"{stage}: {seen[-1]}, {left} pages", wrong, how)
        wrong = clear_error(lane.said()) if status else []
        wrong += differences(campaign.whole, lane.folder)
        unhit = [name for name in outputs(arguments) if not any(name in key for key in seen)]
        wrong += [f"no write of {name} was seen" for name in unhit]
        campaign.tally.add("disk", "full", f"{stage}: with space again", wrong, "went on to the same results")


def test_a_full_disk_at_each_write(campaign: Campaign) -> None:
    chosen = [stage for stage in campaign.commands if "classifier" not in stage and "scratch" not in stage]

    def work(stage: str) -> None:
        if not campaign.late():
            with small_disk(campaign.folder / f"disk-{stage.replace(' ', '-')}") as disk:
                full_at_each_write(campaign, finished(campaign.reference.folder, disk), stage)

    try:
        campaign.side_by_side(work, chosen)
    except PermissionError as error:
        campaign.tally.skip("disk", "full", f"nothing may be mounted ({error})")
        pytest.skip(f"nothing may be mounted here ({error}); root may")
    assert not campaign.tally.failed("disk")
