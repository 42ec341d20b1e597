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

import pytest

from .conftest import Campaign
from .judge import differences
from .lanes import PATIENCE, Lane, blank, clear_error, end, finished, jobs, wait_for, warm

pytestmark = pytest.mark.torture

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TRIES = 6  # of the last command of a walk, where a process that outlived a kill is at its work
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


def ended(process: subprocess.Popen[bytes], whom: str) -> list[str]:
    """Wait for the end of what was hit. A job's end is the program's matter, which goes on with the others."""
    try:
        process.wait(PATIENCE / 3)
    except subprocess.TimeoutExpired:
        end(process.pid)
        process.wait()
        return [f"did not end within {PATIENCE / 3:.0f} s of the signal"]
    return []


def cached_whole(folder: Path) -> list[str]:
    """Files of DVC's cache whose content is not what their name says."""
    files = (path for path in (folder / ".dvc/cache/files/md5").rglob("*") if path.is_file())
    wrong = [p for p in files if hashlib.md5(p.read_bytes()).hexdigest() != p.parent.name + p.name.removesuffix(".dir")]
    return [f"{path.relative_to(folder)} is not what its name says" for path in wrong]


def go_on(lane: Lane, command: tuple[str, ...]) -> list[str]:
    """The same command, until it is through; what is wrong with that."""
    for _ in range(TRIES):
        if lane.call(*command) == 0:
            return []
        if "another process is at work on this" not in lane.said():
            break
        time.sleep(5)
    return [f"{' '.join(command)} does not go on: {lane.said().strip()[-300:]}"]


def walk(campaign: Campaign, kind: str, lane: Lane, command: tuple[str, ...], kills: int, longest: float, rng: random.Random) -> bool:
    """Run the command, hit it so many times on its way, let it end, and compare. False when it ended before the last kill."""
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
        wrong = ended(process, whom) if hit or process.poll() is None else []
        if not hit:
            break
        hits += 1
        if number == signal.SIGKILL and whom != "job":
            lane.call("snakemake", "--unlock")
        elif "Directory cannot be locked" in lane.said():
            wrong.append("the folder was left locked by a signal that can be handled")
        wrong += differences(campaign.whole, lane.folder, whole=False)
        done.append((f"{number.name} for {whom} after {moment:.1f} s", wrong))
    wrong = go_on(lane, command)
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
    return hits == kills


def walks(campaign: Campaign, kind: str, lane: str, kills: int) -> None:
    """Kills of one kind, in as many walks as it takes."""
    rng = campaign.random(kind, lane)
    left = kills
    while left and not campaign.late():
        before = len(campaign.tally.cases)
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
        walk(campaign, kind, here, command, left, longest, rng)
        mine = [case for case in campaign.tally.cases[before:] if case.kind == kind]
        left -= max(1, min(left, len(mine)))
        shutil.rmtree(folder, ignore_errors=True)


def without(lock: str, stage: str) -> str:
    """dvc.lock's text without one stage."""
    import yaml

    content = yaml.safe_load(lock)
    del content["stages"][stage]
    return yaml.safe_dump(content, sort_keys=False)


def test_kills_at_random_moments(campaign: Campaign) -> None:
    n = campaign.n
    shares = [("snakemake", "a", -(-n * 7 // 20)), ("dvc repro", "a", n // 5), ("snakemake", "b", n * 5 // 20), ("record", "a", n // 5)]
    campaign.side_by_side(lambda share: walks(campaign, *share), shares)
    assert not campaign.tally.failed("kill")


def kill_at_each_write(campaign: Campaign, stage: str) -> None:
    """A stage that is killed at every write once, and goes on each time."""
    lane = finished(campaign.reference.folder, campaign.folder / f"write-{stage.replace(' ', '-')}")
    arguments = campaign.commands[stage]
    from .lanes import outputs

    for name in outputs(arguments):
        (lane.folder / name).unlink(missing_ok=True)
    told = lane.folder.with_suffix(".told")
    seen: list[str] = []
    with warm(lane) as runner:
        while not campaign.late():
            told.unlink(missing_ok=True)
            status = runner.call(arguments, {"do": "kill", "seen": seen, "told": str(told)})
            if not told.exists():
                break
            seen.append(told.read_text())
            wrong = [] if status == -signal.SIGKILL else [f"ended with {status} instead of the kill"]
            campaign.tally.add("kill", "at a write", f"{stage}: {seen[-1]}", wrong + differences(campaign.whole, lane.folder, whole=False))
        wrong = clear_error(lane.said()) if status else []
        wrong += differences(campaign.whole, lane.folder)
        unhit = [name for name in outputs(arguments) if not any(name in key for key in seen)]
        wrong += [f"no write of {name} was seen" for name in unhit]
        campaign.tally.add("kill", "at a write", f"{stage}: left alone at last", wrong)


def test_kills_at_each_write(campaign: Campaign) -> None:
    campaign.side_by_side(lambda stage: kill_at_each_write(campaign, stage), [s for s in campaign.commands if "classifier" not in s])
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
    from .lanes import outputs

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
