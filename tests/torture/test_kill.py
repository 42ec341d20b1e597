"""Killed anywhere, the same command goes on, and ends with what an undisturbed run made."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from .conftest import Campaign
from .judge import differences
from .lanes import PATIENCE, Lane, Warm, blank, clear_error, end, finished, jobs, outputs, wait_for, warm

pytestmark = pytest.mark.torture

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STAGES = ("finetune-eb_jdat-seed0", "energy-classifier-seed0", "reliability-eb_jdat-seed0", "report")  # that `dvc repro` runs


def strike(process: subprocess.Popen[bytes], whom: str, number: signal.Signals, rng: random.Random) -> bool:
    """Send a signal to the program ("leader"), its whole group, or one of its jobs. False where there was nothing left to hit."""
    if whom == "job":
        wait_for(lambda: bool(jobs(process)) or process.poll() is not None, 60)
        for job in rng.sample(found := jobs(process), len(found)):
            try:
                job.send_signal(number)
            except Exception:  # it has just ended
                continue
            return True
        return False
    if process.poll() is not None:
        return False
    (os.killpg if whom == "group" else os.kill)(process.pid, number)
    return True


def ended(process: subprocess.Popen[bytes]) -> list[str]:
    """Wait for the end of what was hit. Where that was a job, its program goes on with the others before it ends."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        end(process.pid)
        process.wait()
        return [f"did not end within {PATIENCE:.0f} s of the signal"]
    return []


def cached_whole(folder: Path) -> list[str]:
    """Files of DVC's cache whose content is not what their name says."""
    files = (path for path in (folder / ".dvc/cache/files/md5").rglob("*") if path.is_file())
    wrong = [p for p in files if hashlib.md5(p.read_bytes()).hexdigest() != p.parent.name + p.name.removesuffix(".dir")]
    return [f"{path.relative_to(folder)} is not what its name says" for path in wrong]


def outlived(groups: list[int]) -> bool:
    """Whether a process of these groups is at work."""
    return any(
        process.info["status"] != psutil.STATUS_ZOMBIE and _group(process.pid) in groups for process in psutil.process_iter(["status"])
    )


def _group(number: int) -> int:
    try:
        return os.getpgid(number)
    except ProcessLookupError:
        return 0


def go_on(lane: Lane, command: tuple[str, ...], groups: list[int]) -> list[str]:
    """The same command, at once; where jobs that outlived a `kill -9` are still at their work, again after they have ended."""
    if lane.call(*command) == 0:
        return []
    first = lane.said()
    if outlived(groups):
        if not wait_for(lambda: not outlived(groups), PATIENCE / 3, 0.5):
            return [f"jobs that outlived a kill do not end: {first.strip()[-300:]}"]
        lane.call("snakemake", "--unlock")
    elif "another process is at work" not in first:
        return [f"{' '.join(command)} does not go on: {first.strip()[-300:]}"]
    return [] if lane.call(*command) == 0 else [f"{' '.join(command)} does not go on: {lane.said().strip()[-300:]}"]


def run_chain(campaign: Campaign, kind: str, lane: Lane, command: tuple[str, ...], kills: int, longest: float, rng: random.Random) -> int:
    """Run the command, hit it so many times on its way, let it end, and compare. Returns how often it was hit before it ended."""
    done: list[tuple[str, list[str]]] = []
    hits = 0
    groups = []
    while hits < kills and not campaign.late():
        number, whom = rng.choice(SIGNALS), rng.choice(("leader", "group", "job"))
        moment = rng.uniform(0.2, longest)
        process = lane.start(*command)
        groups.append(process.pid)
        wait_for(lambda process=process: process.poll() is not None, moment)
        hit = strike(process, whom, number, rng)
        wrong = ended(process)
        if not hit:
            break
        hits += 1
        if "Directory cannot be locked" in lane.said():
            wrong.append("the folder was still locked")
        if number == signal.SIGKILL and whom != "job":  # as the pages say; after other signals nothing is needed
            lane.call("snakemake", "--unlock")
        wrong += differences(campaign.whole, lane.folder, whole=False)
        done.append((f"{number.name} for {whom} after {moment:.1f} s", wrong))
    wrong = go_on(lane, command, groups)
    if command[0] == "dvc" and not wrong:  # then what follows from those stages: a checkpoint that was made again holds other seconds
        wrong = go_on(lane, ("dvc", "repro"), groups)
    for group in groups:
        end(group)
    if not wrong:
        wrong = differences(campaign.whole, lane.folder)
        said = lane.run("snakemake", "--dry-run", "--cores", "1", ok=False)
        wrong += [] if "Nothing to be done" in said else [f"snakemake would run again: {Lane.jobs(said)}"]
        said = lane.run("dvc", "status", ok=False)
        wrong += [] if "up to date" in said else [f"dvc status: {said.strip()[:300]}"]
        wrong += cached_whole(lane.folder)
    for name, found in done:  # which of a walk's kills it was cannot be told: all count
        campaign.tally.add("kill", kind, name, [*found, *wrong])
    return hits


def walks(campaign: Campaign, kind: str, lane: str, kills: int) -> None:
    """Kills of one kind, in as many walks as it takes."""
    rng = campaign.random(kind, lane)
    left = kills
    while left and not campaign.late():
        folder = campaign.folder / f"{kind.replace(' ', '-')}-{lane}"
        reference = campaign.reference.folder
        if kind == "snakemake":
            here, command, longest = blank(reference, folder), ("snakemake", "--cores", "1"), campaign.seconds / 4
        elif kind == "record":
            here, command, longest = finished(reference, folder), ("snakemake", "--cores", "1"), campaign.seconds / 8
            shutil.rmtree(folder / ".dvc/cache")
            shutil.rmtree(folder / ".dvc/tmp")
            (folder / "dvc.lock").unlink()
        else:
            here, command, longest = finished(reference, folder), ("dvc", "repro", "--single-item", *STAGES), campaign.seconds / 4
            shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)
            lock = (folder / "dvc.lock").read_text()
            for stage in STAGES:  # as if these had never run
                lock = without(lock, stage)
            (folder / "dvc.lock").write_text(lock)
        left -= max(1, run_chain(campaign, kind, here, command, left, longest, rng))
        shutil.rmtree(folder, ignore_errors=True)


def without(lock: str, stage: str) -> str:
    """dvc.lock's text without one stage."""
    content = yaml.safe_load(lock)
    del content["stages"][stage]
    return yaml.safe_dump(content, sort_keys=False)


def test_kills_at_random_moments(campaign: Campaign) -> None:
    n = campaign.n
    shares = [("snakemake", "a", -(-n * 7 // 20)), ("dvc repro", "a", n // 5), ("snakemake", "b", n * 5 // 20), ("record", "a", n // 5)]
    campaign.side_by_side(lambda share: walks(campaign, *share), shares)
    assert not campaign.tally.failed("kill")


def kill_at_each_write(campaign: Campaign, runner: Warm, stage: str) -> None:
    """A stage that is killed at every write once, and goes on each time."""
    lane, arguments = runner.lane, campaign.commands[stage]
    for name in outputs(arguments):
        (lane.folder / name).unlink()
    told = lane.folder.with_suffix(".told")
    seen: list[str] = []
    while not campaign.late():
        told.unlink(missing_ok=True)
        status = runner.call(arguments, {"do": "kill", "seen": seen, "told": str(told)})
        if not told.exists():
            break
        seen.append(told.read_text())
        wrong = [] if status == -signal.SIGKILL else [f"ended with {status} instead of the kill"]
        campaign.tally.add("kill", "at a write", f"{stage}: {seen[-1]}", wrong + differences(campaign.whole, lane.folder, whole=False))
    else:
        return
    wrong = clear_error(lane.said()) if status else []
    wrong += differences(campaign.whole, lane.folder)
    wrong += [f"no write of {name} was seen" for name in outputs(arguments) if not any(name in key for key in seen)]
    campaign.tally.add("kill", "at a write", f"{stage}: left alone at last", wrong)


def test_kills_at_each_write(campaign: Campaign) -> None:
    def work(part: list[str]) -> None:
        with warm(finished(campaign.reference.folder, campaign.folder / f"write-{part[0].split()[0]}")) as runner:
            for stage in part:
                kill_at_each_write(campaign, runner, stage)

    campaign.side_by_side(work, campaign.shares())
    assert not campaign.tally.failed("kill")


def signature(folders: list[Path]) -> list[tuple[str, int, int]]:
    found = []
    for folder in folders:
        for at, _, names in os.walk(folder):
            for name in names:
                try:
                    status = os.stat(os.path.join(at, name))
                except FileNotFoundError:
                    continue
                found.append((os.path.join(at, name), status.st_size, status.st_mtime_ns))
    return found


def test_kills_in_a_write(campaign: Campaign) -> None:
    """Seen from outside: as soon as a state or a checkpoint begins to change, and up to some milliseconds later."""
    rng = campaign.random("in a write")
    lane = finished(campaign.reference.folder, campaign.folder / "in-a-write")
    arguments = campaign.commands["finetune eb_jdat"]
    places = [lane.folder / "state" / "digits" / "eb_jdat", lane.folder / "checkpoints/digits/eb_jdat"]
    with warm(lane) as runner:
        for i in range(campaign.n // 5):
            if campaign.late():
                break
            for name in outputs(arguments):
                (lane.folder / name).unlink(missing_ok=True)
            delay, change = rng.uniform(0, 0.004), rng.randint(1, 6)

            def hit(number: int, delay: float = delay, change: int = change) -> None:
                for _ in range(change):
                    before = signature(places)
                    while (now := signature(places)) == before:
                        if not alive(number):
                            return
                    before = now
                time.sleep(delay)
                os.kill(number, signal.SIGKILL)

            status = runner.call(arguments, meanwhile=hit)
            wrong = differences(campaign.whole, lane.folder, whole=False)
            again = runner.call(arguments)
            wrong += clear_error(lane.said()) if again else differences(campaign.whole, lane.folder)
            campaign.tally.add(
                "kill", "in a write", f"{i}: change {change}, {1000 * delay:.1f} ms", wrong, "" if status else "ended before"
            )
    assert not campaign.tally.failed("kill")


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
