"""Results that DVC put here (`dvc pull`, `dvc checkout`, `dvc exp apply`): Snakemake takes them over, or makes them again.

Snakemake keeps a record of every file that its jobs wrote, and judges files without one by their time stamps alone: results
from elsewhere would all run again, or pass for new ones. So before it plans, the Snakefile asks here. Time stamps of all results
are kept at the end of each run (state/stamps-PROFILE.json). Only where a file has another one, or dvc.lock is another one than the
last time, does DVC have to say what the files are:

- outputs, inputs, code and settings are those of dvc.lock, and so are those of all stages before: taken over (recorded);
- outputs are ones that DVC knows (those of dvc.lock or of another version), but anything else differs: old results. They lose
  their record and get the oldest time stamp there is, so that Snakemake makes them again. Nothing is deleted;
- outputs that nobody knows: left to Snakemake.

Nothing of this touches a file's content, so links into DVC's cache are safe.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dvc_stages
import yaml

from ebjdat.files import write_text

OLDEST = (1, 1)  # seconds since 1970; Snakemake takes 0 for "unknown"
# Set for the programs that are called here, which then do not ask again.
ASKED = "EBJDAT_DVC_ASKED"


class DvcError(Exception):
    """DVC or Snakemake could not say what the results are."""


def run(*command: str, unless: str = "") -> str:
    """The program's output. Raises DvcError where it fails, unless it says `unless`."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, ASKED: "1"}, check=False)
    if done.returncode and not (unless and unless in done.stdout + done.stderr):
        raise DvcError(f"{' '.join(command)[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def stamp(name: str) -> list[int]:
    status = os.lstat(name)
    return [status.st_mtime_ns, status.st_size]


def is_own(name: str, stamps: dict[str, Any]) -> bool:
    """Whether it is as Snakemake's last run left it, and was not marked as old."""
    return stamps.get(name) == stamp(name) and stamp(name)[0] != OLDEST[1] * 10**9


def stamps_file(profile: str) -> Path:
    return Path(f"state/stamps-{profile}.json")


def keep_stamps(profile: str, names: Iterable[str]) -> None:
    """Note the time stamps of a profile's results: from now on they are Snakemake's own."""
    write_text(stamps_file(profile), json.dumps({name: stamp(name) for name in names if os.path.lexists(name)}))


def read_stamps(profile: str) -> dict[str, Any]:
    try:
        return dict(json.loads(stamps_file(profile).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not there, or damaged: DVC is asked about every file
        return {}


def is_known(name: str, hashes: set[str], cache: Path) -> bool:
    """Whether DVC has the file's content, as one of these or in its cache."""
    with open(name, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return md5 in hashes or (cache / "files/md5" / md5[:2] / md5[2:]).exists()


def lock_of(profile: str) -> Path:
    return dvc_stages.target(profile).with_suffix(".lock")


def last_synced_lock(profile: str) -> Path:
    """A copy of dvc.lock as it was when Snakemake's records were last known to agree with it."""
    return Path(f".dvc/tmp/synced-{profile}")


def locked_outputs(profile: str) -> dict[str, dict[str, str]]:
    """Stage -> outputs and their hashes in the profile's dvc.lock; nothing where there is no dvc.lock."""
    lock = lock_of(profile)
    if not lock.exists():
        return {}
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
        stages = {name: entry for name, entry in stages.items() if name != dvc_stages.DIGESTS}
        return {stage: {str(o["path"]): str(o.get("md5", "")) for o in entry.get("outs", [])} for stage, entry in stages.items()}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DvcError(f"{lock}: not as DVC writes it (an unfinished merge?): {type(error).__name__}: {error}") from None


def outputs_of(stage: dict[str, Any]) -> list[str]:
    return [*stage["outs"], *stage.get("metrics", [])]


def current(profile: str, stages: dict[str, dict[str, Any]]) -> list[str]:
    """Those of the stages whose outputs, inputs, code and settings are those of dvc.lock, and so for all stages before; in their order."""
    file = dvc_stages.target(profile)
    if not file.exists():
        return []
    prefix = "" if profile == dvc_stages.DEFAULT else f"{file}:"
    dvc_stages.write_digests(dvc_stages.digests(profile))
    changed = json.loads(run("dvc", "status", "--json", str(file)))
    # dvc.yaml, which DVC has just read, may be older than the settings, and then not name what a stage depends on now.
    written = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    names, good = [], set()
    for name, stage in stages.items():
        made_here = [d for d in stage["deps"] if d.startswith(("data/", "checkpoints/", "results/"))]
        if prefix + name not in changed and stage == written.get(name) and good.issuperset(made_here):
            names.append(name)
            good.update(outputs_of(stage))
    return names


def to_adopt(good: dict[str, dict[str, Any]], foreign: set[str]) -> list[str]:
    """Those of the current stages that are not Snakemake's own, and all that follow from them: their inputs are newer now."""
    adopted: list[str] = []
    fresh: set[str] = set()
    for name, stage in good.items():
        if name in foreign or fresh.intersection(stage["deps"]):
            adopted.append(name)
            fresh.update(outputs_of(stage))
    return adopted


def adopt_dvc_outputs(profile: str) -> str:
    """Take over or mark as old what DVC put here. Returns what to tell the user, "" when all files are Snakemake's own."""
    outputs = locked_outputs(profile)
    here = {stage: [name for name in names if os.path.exists(name)] for stage, names in outputs.items()}
    stamps = read_stamps(profile)
    lock, synced = lock_of(profile), last_synced_lock(profile)
    # Another dvc.lock than last time (git checkout): the same bytes can be what other settings or code make, too.
    same = bool(here) and synced.exists() and filecmp.cmp(lock, synced, shallow=False)
    others = {stage: [name for name in names if not is_own(name, stamps)] for stage, names in here.items()}
    foreign = {stage for stage, names in others.items() if names}
    if (same and not foreign) or not any(here.values()):
        return ""
    stages = {name: stage for name, stage in dvc_stages.stages(profile).items() if name != dvc_stages.DIGESTS}
    good = current(profile, stages)
    adopted = to_adopt({name: stages[name] for name in good}, foreign) if same else good
    suspects = [name for stage in sorted(foreign - set(good)) for name in others[stage]]
    cache = Path(run("dvc", "cache", "dir").strip()) if suspects else Path()
    hashes = {md5 for names in outputs.values() for md5 in names.values()}
    old = [name for name in suspects if is_known(name, hashes, cache)]
    config = ("--nolock", "--config", f"profile={profile}")  # nobody is at work here; a lock that is left is of a run that was killed
    if old:
        run("snakemake", *config, "--cleanup-metadata", *old, unless="the metadata was not present")
    for name in old:
        os.utime(name, OLDEST, follow_symlinks=False)
    if adopted:
        targets = [name for stage in adopted for name in here[stage]]
        if len(good) == len(stages):  # dvc.lock may hold a part of them
            recorded = Path(dvc_stages.recorded(profile))
            recorded.parent.mkdir(parents=True, exist_ok=True)
            recorded.touch()
            targets.append(str(recorded))
        run("snakemake", "--touch", *config, "--forcerun", *targets, "--", *targets)
    keep_stamps(profile, (name for stage in stages.values() for name in outputs_of(stage)))
    synced.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lock, synced)
    messages = [f"{len(adopted)} of {len(outputs)} stages are taken over from DVC"] if adopted else []
    messages += [f"{len(foreign - set(good))} hold results of other settings, code or data and will be made again"] if old else []
    return "; ".join(messages)
