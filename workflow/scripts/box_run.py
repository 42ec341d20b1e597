#!/usr/bin/env python3
"""Run the stages of this folder, one after another, on a machine that has Python, torch and a few small packages.

    python run.py [--minutes M] [--only STAGE ...]      run what is not done yet
    python run.py --status                              say what is done

A stage is done when its outputs are the ones in done.json and its inputs are still those that it read. After M minutes the
stage at work is asked to stop: training and attacks have kept their state, and the same command continues from there. So it does
after Ctrl-C, kill, kill -9 or a machine that went away. Exit codes: 0 all done, 1 a stage failed, 2 this machine or this
folder cannot be used, 75 run it again to continue.

This file needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
DONE = HERE / "done.json"
TO_CONTINUE = 75  # EX_TEMPFAIL of sysexits.h
POLL = 0.1  # seconds between two looks at the stage at work
GRACE = 120.0  # seconds that a stage has to stop; what it kept before is kept all the same
PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux's prctl
PROBE = """
import importlib.util, json, platform, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
answer = {"python": platform.python_version(), "system": platform.system(), "processor": platform.machine()}
if not missing:
    import torch
    answer |= {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu"}
    if torch.cuda.is_available():
        answer["device"] = torch.cuda.get_device_name(0)
print(json.dumps({"missing": missing, "machine": answer}))
"""

TORCH = (2, 11)
Stage = dict[str, Any]


class Stop:
    """Whether it is time to stop, and why: the minutes are over, or somebody asked for it."""

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked = ""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = signal.Signals(number).name

    def reason(self) -> str:
        """Empty as long as it is not."""
        return self._asked or ("time is up" if self._deadline is not None and time.monotonic() > self._deadline else "")


_hashes: dict[tuple[str, int, int], str] = {}


def sha256(name: str) -> str:
    """Of a file in this folder; "" where there is none."""
    try:
        answer = (HERE / name).stat()
        key = (name, answer.st_mtime_ns, answer.st_size)
        if key not in _hashes:
            with (HERE / name).open("rb") as file:
                _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _hashes[key]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ""


def read_file(path: Path, advice: str) -> dict[str, Any]:
    """A file of the box, which names stages. Exits with one line where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        len(found["stages"])
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path}: damaged or not there ({type(error).__name__}); {advice}")


def read_done() -> dict[str, Stage]:
    return dict(read_file(DONE, "delete it, and the stages run again")["stages"]) if DONE.exists() else {}


def write_done(stages: dict[str, Stage]) -> None:
    """Whole or not at all, whenever this is killed."""
    temporary = DONE.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"format": 1, "stages": stages}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, DONE)


def inputs_of(stage: Stage) -> dict[str, str]:
    """What a stage reads, and its content now."""
    return {name: sha256(name) for name in stage["inputs"]}


def fixed(manifest: dict[str, Any]) -> str:
    """Digest of code and settings as they are now."""
    return hashlib.sha256("\n".join(sha256(name) for name in manifest["fixed"]).encode()).hexdigest()


def state_of(stage: Stage, manifest: dict[str, Any], done: dict[str, Stage]) -> str:
    """One of "done", "begun", "again" (done once, but inputs or outputs are others now), "to do"."""
    entry = done.get(stage["name"])
    if entry is None:
        return "to do"
    same = (entry["command"], entry["inputs"], entry["fixed"]) == (stage["command"], inputs_of(stage), fixed(manifest))
    if "outputs" not in entry:
        return "begun" if same else "again"
    return "done" if same and entry["outputs"] == {name: sha256(name) for name in stage["outputs"]} else "again"


def probe(manifest: dict[str, Any]) -> dict[str, Any]:
    """What this machine is. Exits with what is missing on it."""
    names = list(manifest["imports"])
    asked = subprocess.run([sys.executable, "-c", PROBE, *names], env=environment(manifest), capture_output=True, text=True, check=False)
    if asked.returncode:
        fail(f"Python cannot say what is installed here:\n{asked.stderr}")
    answer = json.loads(asked.stdout)
    if answer["missing"]:
        wanted = ", ".join(manifest["imports"][name] for name in answer["missing"])
        how = f"`python -m pip install -r {HERE / 'requirements.txt'}` (README.md there says how without network)"
        own = "; torch and torchvision are not in it: install those that fit your GPU" if "torch" in answer["missing"] else ""
        fail(f"missing on this machine: {wanted}; {how}{own}")
    release = tuple(int(part) for part in answer["machine"]["torch"].split(".")[:2])
    if release < TORCH:
        fail(f"torch {answer['machine']['torch']} is too old; {'.'.join(map(str, TORCH))} or newer is needed")
    return dict(answer["machine"])


def environment(manifest: dict[str, Any]) -> dict[str, str]:
    """For the stages: this folder's code and packages first, no sender of metrics, and what only the workstation knows."""
    paths = [str(HERE / "src"), *([str(HERE / "site")] if (HERE / "site").is_dir() else []), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "EBJDAT_TRACKING": "0",
        "EBJDAT_COMMIT": manifest["commit"],
        "EBJDAT_HOST": "box",
    }


def die_with(parent: int) -> None:
    """A stage is asked to stop when this program is killed: two of it must not write the same files."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before it could be asked for
        os._exit(1)


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def run(stage: Stage, manifest: dict[str, Any], stop: Stop, continued: bool, lock: int) -> int:
    """Run a stage and show what it says, which its log keeps. Returns its exit code."""
    log = HERE / stage["log"]
    for name in (*stage["outputs"], stage["log"]):
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab" if continued else "wb") as written, log.open("rb") as shown:
        shown.seek(0, os.SEEK_END)
        runner = os.getpid()
        process = subprocess.Popen(
            [sys.executable, *stage["command"]],
            cwd=HERE,
            env=environment(manifest),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then asks the stage
            preexec_fn=lambda: die_with(runner),
            pass_fds=(lock,),  # held as long as the stage lives
        )
        asked = 0.0
        while True:
            ended = has_ended(process.pid)  # asked before, so that its last words are shown
            sys.stdout.write(shown.read().decode(errors="replace"))
            sys.stdout.flush()
            if ended:
                break
            if not asked and (reason := stop.reason()):
                asked = time.monotonic()
                print(f"{reason}: {stage['name']} is asked to stop", flush=True)
                process.terminate()
            elif asked and time.monotonic() - asked > GRACE:
                process.kill()
            time.sleep(POLL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)  # workers of an attack that did not end by itself
        return process.wait()


def fail(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(2)


def chosen(stages: list[Stage], only: list[str]) -> list[Stage]:
    """Those with these names, or whose names begin so: "finetune", "attack-eb_jdat"."""
    found = [s for s in stages if not only or any(s["name"] == word or s["name"].startswith(f"{word}-") for word in only)]
    unknown = [word for word in only if not any(s["name"] == word or s["name"].startswith(f"{word}-") for s in stages)]
    if unknown:
        fail(f"no stage is called {', '.join(unknown)}; --status lists them")
    return found


def show(stages: list[Stage], manifest: dict[str, Any], done: dict[str, Stage]) -> None:
    states = [state_of(stage, manifest, done) for stage in stages]
    for stage, state in zip(stages, states, strict=True):
        entry = done.get(stage["name"], {})
        took = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
        print(f"  {state:6}  {stage['name']:50} {took:>8}")
    print(f"{states.count('done')} of {len(stages)} stages of {manifest['run']} are done")


def finish(stage: Stage, entry: Stage, done: dict[str, Stage]) -> None:
    """Note a stage's outputs."""
    files = {name: sha256(name) for name in stage["outputs"]}
    done[stage["name"]] = {**entry, "outputs": files, "log": {stage["log"]: sha256(stage["log"])}}
    write_done(done)


def work(stages: list[Stage], manifest: dict[str, Any], stop: Stop, lock: int) -> int:
    """Run what is not done, in this order. Returns the exit code."""
    done, machine, failed = read_done(), None, []
    for number, stage in enumerate(stages, 1):
        name, title = stage["name"], f"[{number}/{len(stages)}] {stage['name']}"
        state = state_of(stage, manifest, done)
        if state == "done":
            print(f"{title}: done", flush=True)
            continue
        absent = [file for file, content in inputs_of(stage).items() if not content]
        if absent:
            failed.append(name)
            print(f"{title}: cannot run, {', '.join(absent)} is missing", flush=True)
            continue
        continued = state == "begun"
        if continued and all(sha256(file) for file in stage["outputs"]):
            # Killed after the stage had written everything (each output appears whole), before that was noted.
            finish(stage, done[name], done)
            print(f"{title}: done", flush=True)
            continue
        if stop.reason():
            print(f"{stop.reason()}: run it again to continue with {name}", flush=True)
            return TO_CONTINUE
        machine = machine or probe(manifest)
        before = done[name] if continued else {"seconds": 0.0, "calls": 0}
        for file in stage["outputs"]:
            (HERE / file).unlink(missing_ok=True)
        entry = {"command": stage["command"], "inputs": inputs_of(stage), "fixed": fixed(manifest), "machine": machine}
        entry |= {"seconds": before["seconds"], "calls": before["calls"] + 1}
        done[name] = entry
        write_done(done)
        print(f"{title}{' continues' if continued else ''}: python {' '.join(stage['command'])}", flush=True)
        began = time.monotonic()
        code = run(stage, manifest, stop, continued, lock)
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 3)
        if code == 0 and all(sha256(file) for file in stage["outputs"]):
            finish(stage, entry, done)
            print(f"{title}: done in {entry['seconds']:.1f} s", flush=True)
            continue
        write_done(done)
        if stop.reason():
            print(f"{stop.reason()}: run it again to continue with {name}", flush=True)
            return TO_CONTINUE
        for file in stage["outputs"]:  # else they would look like those of a stage that was killed after its end
            (HERE / file).unlink(missing_ok=True)
        failed.append(name)
        print(f"{title}: FAILED with exit code {code}; {stage['log']} says why", flush=True)
    if failed:
        print(f"{len(stages) - len(failed)} of {len(stages)} stages are done; not done: {', '.join(failed)}", flush=True)
        return 1
    print(f"all {len(stages)} stages are done: copy this folder back", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long, to be called again")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="names of stages, or how they begin")
    parser.add_argument("--status", action="store_true", help="say what is done, run nothing")
    asked = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (nothing has checked that before)
        fail(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    manifest = read_file(HERE / "box.json", "bring it here again from where the box was packed")
    stages = chosen(manifest["stages"], asked.only)
    if asked.status:
        show(stages, manifest, read_done())
        return 0
    with (HERE / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail("another run.py, or a stage of one that was killed, is still at work in this folder; wait for it")
        return work(stages, manifest, Stop(asked.minutes), lock.fileno())


if __name__ == "__main__":
    sys.exit(main())
