"""Results that DVC put here (`dvc pull`, `dvc checkout`, `dvc exp apply`): Snakemake takes them over, or makes them again.

Snakemake keeps a record of every file that its jobs wrote, and judges files without one by their time stamps alone: results
from elsewhere would all run again, or pass for new ones. So before it plans, the Snakefile asks here. A file is Snakemake's own
when its time stamp is the one in its record. Only where a file is not, or dvc.lock is another one than the last time, does DVC
have to say what it is:

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
import sys
from pathlib import Path
from typing import Any

import dvc_stages
import yaml
from snakemake.persistence.file import FilePersistence

OLDEST = (1, 1)  # seconds since 1970; Snakemake takes 0 for "unknown"
RUNNING = Path(".dvc/tmp/rwlock")
SELF = "snakemake"  # its name in DVC's lock file
# Set for the programs that are called here, which then do not ask again.
ASKED = "EBJDAT_DVC_ASKED"


class BusyError(Exception):
    """DVC is at work in this folder."""


class DvcError(Exception):
    """DVC or Snakemake could not say what the results are."""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, ASKED: "1"}, check=False)
    if done.returncode:
        raise DvcError(f"{' '.join(command)[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_locks() -> dict[str, Any]:
    """DVC's lock file: {"write": {path: holder}, "read": {path: [holder, ...]}}, a holder {"pid": ..., "cmd": ...}; {} where none is.

    Raises DvcError where it is damaged: DVC itself would then refuse every command.
    """
    try:
        text = RUNNING.read_text(encoding="utf-8") if RUNNING.is_file() else "{}"
        locks = json.loads(text)
        writers, readers = locks.get("write", {}), locks.get("read", {})
        holders = [*writers.values(), *(holder for several in readers.values() for holder in several)]
        whole = all(type(holder["pid"]) is int and 0 < holder["pid"] < 2**31 and isinstance(holder["cmd"], str) for holder in holders)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DvcError(damaged(type(error).__name__)) from None
    if not whole:
        raise DvcError(damaged("an entry without its process"))
    return dict(locks)


def damaged(why: str) -> str:
    return f"{RUNNING}: not as DVC writes it ({why}); when no dvc command runs here (ps aux | grep dvc), delete the file and run again"


def refuse_beside_dvc() -> None:
    """Raise BusyError when a `dvc repro` is running a stage here: it deletes outputs that Snakemake would go on from."""
    for holder in read_locks().get("write", {}).values():
        if holder["pid"] != os.getpid() and alive(holder["pid"]):
            raise BusyError(
                f"`{holder['cmd']}` (process {holder['pid']}) is at work in this folder; wait for it, or stop it, and run again"
            )


def announce(*folders: str) -> None:
    """Tell DVC, in its own lock file, that these folders are in use: `dvc repro` then refuses before it deletes anything there."""
    from dvc.fs import localfs
    from dvc.rwlock import _edit_rwlock

    RUNNING.parent.mkdir(parents=True, exist_ok=True)
    with _edit_rwlock(str(RUNNING.parent.resolve()), localfs, False) as locks:
        for folder in folders:
            locks["read"][os.path.abspath(folder)].append({"pid": os.getpid(), "cmd": SELF})


def release(*folders: str) -> None:
    """Take `announce` back: also from another process, since the rule `record` calls DVC while Snakemake runs."""
    from dvc.fs import localfs
    from dvc.rwlock import _edit_rwlock

    with _edit_rwlock(str(RUNNING.parent.resolve()), localfs, False) as locks:
        for folder in map(os.path.abspath, folders):
            locks["read"][folder] = [holder for holder in locks["read"].get(folder, []) if holder["cmd"] != SELF]
            if not locks["read"][folder]:
                del locks["read"][folder]


def is_own(name: str, records: FilePersistence) -> bool:
    """Whether Snakemake wrote the file and nobody replaced it since."""
    record = records._read_record(name)
    return record is not None and record.endtime == os.lstat(name).st_mtime


def is_known(name: str, hashes: set[str], cache: Path) -> bool:
    """Whether DVC has the file's content, as one of these or in its cache."""
    with open(name, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return md5 in hashes or (cache / "files/md5" / md5[:2] / md5[2:]).exists()


def lock_of(profile: str) -> Path:
    return dvc_stages.target(profile).with_suffix(".lock")


def settled(profile: str) -> Path:
    """A copy of dvc.lock as it was when Snakemake's records were last known to agree with it."""
    return Path(f".dvc/tmp/settled-{profile}")


def locked_outputs(profile: str) -> dict[str, dict[str, str]]:
    """Stage -> outputs and their hashes in the profile's dvc.lock; nothing where there is no dvc.lock."""
    lock = lock_of(profile)
    if not lock.exists():
        return {}
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
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
    changed = json.loads(run("dvc", "status", "--json", str(file)))
    # dvc.yaml, which DVC has just read, may be older than the settings, and then not name what a stage depends on now.
    written = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    found, good = [], set()
    for name, stage in stages.items():
        made_here = [d for d in stage["deps"] if d.startswith(("data/", "checkpoints/", "results/"))]
        if prefix + name not in changed and stage == written.get(name) and good.issuperset(made_here):
            found.append(name)
            good.update(outputs_of(stage))
    return found


def taken_over(good: dict[str, dict[str, Any]], foreign: set[str]) -> list[str]:
    """Those of the current stages that are not Snakemake's own, and all that follow from them: their inputs are newer now."""
    adopted: list[str] = []
    fresh: set[str] = set()
    for name, stage in good.items():
        if name in foreign or fresh.intersection(stage["deps"]):
            adopted.append(name)
            fresh.update(outputs_of(stage))
    return adopted


def settle(profile: str) -> str:
    """Take over or mark as old what DVC put here. Returns what to tell the user, "" when all files are Snakemake's own."""
    outputs = locked_outputs(profile)
    here = {stage: [name for name in names if os.path.exists(name)] for stage, names in outputs.items()}
    records = FilePersistence(nolock=True)
    lock, before = lock_of(profile), settled(profile)
    # Another dvc.lock than last time (git checkout): the same bytes can be what other settings or code make, too.
    same = bool(here) and before.exists() and filecmp.cmp(lock, before, shallow=False)
    foreign = {stage for stage, names in here.items() if not all(is_own(name, records) for name in names)}
    if (same and not foreign) or not any(here.values()):
        return ""
    stages = dvc_stages.stages(profile)
    good = current(profile, stages)
    adopted = taken_over({name: stages[name] for name in good}, foreign) if same else good
    suspects = [name for stage in sorted(foreign - set(good)) for name in here[stage] if not is_own(name, records)]
    cache = Path(run("dvc", "cache", "dir").strip()) if suspects else Path()
    hashes = {md5 for names in outputs.values() for md5 in names.values()}
    old = [name for name in suspects if is_known(name, hashes, cache)]
    for name in old:
        records._delete_record(name)
        os.utime(name, OLDEST, follow_symlinks=False)
    if adopted:
        targets = [name for stage in adopted for name in here[stage]]
        if len(good) == len(stages):  # dvc.lock may hold a part of them
            recorded = Path(dvc_stages.recorded(profile))
            recorded.parent.mkdir(parents=True, exist_ok=True)
            recorded.touch()
            targets.append(str(recorded))
        run("snakemake", "--touch", "--config", f"profile={profile}", "--forcerun", *targets, "--", *targets)
    before.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lock, before)
    said = [f"{len(adopted)} of {len(outputs)} stages are taken over from DVC"] if adopted else []
    said += [f"{len(foreign - set(good))} hold results of other settings, code or data and will be made again"] if old else []
    return "; ".join(said)


if __name__ == "__main__":
    release(*sys.argv[1:])
