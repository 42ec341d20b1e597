#!/usr/bin/env python3
"""This folder's stages run one after another, on Linux with Python 3.11 or newer, torch 2.11 or newer and torchvision.

    python -m pip install -r requirements.txt   # once
    python run.py                               # everything; again after any interruption
    python run.py --minutes 9                   # stop in time and keep the state; exit code 75: run it again to continue
    python run.py --only finetune attack-trades # only stages whose names begin so
    python run.py --status                      # what is done

If there is no network, `pip install --target site --python-version 3.12 --only-binary :all: --no-deps NAME==VERSION …` for what
is missing here, on a machine that has one: packages in the folder `site`, beside this file, are found.

Exit codes: 0 all is done, 1 a stage failed, 2 this machine or folder cannot be used, 75 run it again to continue. Then copy the
folder back (`src` and `site` may stay) and, in the checkout that it came from, run `make unbox BOX=…`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "site"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from ebjdat.errors import UserError, few
from ebjdat.files import read_json, write_json

HERE = Path(__file__).resolve().parent
DONE = HERE / "done.json"
TO_CONTINUE = 75  # EX_TEMPFAIL of sysexits.h
POLL = 0.1  # seconds between two looks at the running stage
GRACE = 120.0  # seconds that a stage has to stop; what it kept before is kept all the same
PR_SET_PDEATHSIG = 1  # of Linux's prctl
TORCH = (2, 11)
PROBE = "import torch; print(torch.__version__); print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'cpu')"

Stage = dict[str, Any]  # of box.json: name, command (for python), log, inputs, outputs, and the code and settings that it depends on
Done = dict[str, dict[str, Any]]  # done.json: by name the stage that was begun, sha256 of its files, seconds, machine


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content; "" where there is no file. It is read again only when its size or time stamp has changed."""
    return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ""


def read(path: Path, advice: str) -> dict[str, Any]:
    """A JSON file of a box. Raises UserError with this advice where it is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        raise UserError(f"{path}: missing or damaged; {advice}") from None


def contents(names: Iterable[str]) -> dict[str, str]:
    """Files of this folder and their sha256."""
    return {name: sha256(HERE / name) for name in names}


def remove(names: Iterable[str]) -> None:
    for name in names:
        (HERE / name).unlink(missing_ok=True)


def state_of(stage: Stage, done: Done) -> str:
    """ "to do", "begun", "done"; or "again": the stage, or a file that it reads or wrote, is no longer that of done.json."""
    entry, inputs, outputs = done.get(stage["name"]), contents(stage["inputs"]), contents(stage["outputs"])
    if entry is None:
        return "to do"
    if entry["stage"] != stage or entry["files"] not in (inputs, inputs | outputs):
        return "again"
    return "done" if all(outputs.values()) else "begun"  # also if this was killed before it noted what a stage had written


def probe(manifest: dict[str, Any]) -> dict[str, str]:
    """What kind of machine this is. Raises UserError for what is missing on it or too old."""
    if missing := [package for module, package in manifest["imports"].items() if importlib.util.find_spec(module) is None]:
        own = "; torch and torchvision are not in it: install those that fit your GPU" if "torch" in missing else ""
        how = f"`python -m pip install -r {HERE / 'requirements.txt'}` (README.md says how without network)"
        raise UserError(f"missing on this machine: {', '.join(missing)}; {how}{own}")
    # In a process of its own, so that this one occupies no memory of the GPU.
    torch, device = subprocess.check_output([sys.executable, "-c", PROBE], text=True).splitlines()
    if tuple(map(int, torch.split(".")[:2])) < TORCH:
        raise UserError(f"torch {torch} is too old; {'.'.join(map(str, TORCH))} or newer is needed")
    return {"device": device, "torch": torch, "python": platform.python_version(), "processor": platform.machine()}


def stop_with(parent: int) -> None:
    """In a stage's process: Linux asks it to stop when `parent` is killed, for two of it must not write the same files."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


def run(stage: Stage, continued: bool, stop: list[str], lock: int) -> int:
    """Run a stage and show what it prints, which its log keeps. Returns its exit code."""
    log, runner = HERE / stage["log"], os.getpid()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab" if continued else "wb") as written, log.open("rb") as shown:
        shown.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, *stage["command"]],
            cwd=HERE,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then asks the stage
            preexec_fn=lambda: stop_with(runner),
            pass_fds=[lock],  # held as long as the stage lives
        )
        code, asked = None, 0.0
        while code is None:
            time.sleep(POLL)
            code = process.poll()
            print(shown.read().decode(errors="replace"), end="", flush=True)
            if stop and not asked:
                asked = time.monotonic()
                print(f"{stop[0]}: {stage['name']} is asked to stop", flush=True)
                process.terminate()
            elif asked and time.monotonic() > asked + GRACE:
                process.kill()
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)  # workers that an attack left
    return code


def work(manifest: dict[str, Any], stages: list[Stage], done: Done, stop: list[str], lock: int) -> int:
    """Run what is not done, in this order. Returns the exit code. stop: why to stop, as soon as there is a reason."""
    machine: dict[str, str] = {}
    failed = []
    for number, stage in enumerate(stages, 1):
        name, title, problem = stage["name"], f"[{number}/{len(stages)}] {stage['name']}", ""
        state = state_of(stage, done)
        if missing := [file for file, content in contents(stage["inputs"]).items() if not content]:
            problem = f"cannot run without {few(missing)}"
        elif state != "done":
            if stop:
                break
            if changed := [file for file, content in manifest["files"].items() if sha256(HERE / file) != content]:
                raise UserError(f"{few(changed)}: changed since the box was packed; undo that, or copy the box here again")
            machine = machine or probe(manifest)
            new = {"stage": stage, "files": contents(stage["inputs"]), "seconds": 0.0}
            entry = done[name] = (done[name] if state == "begun" else new) | {"machine": machine}
            remove(stage["outputs"])
            write_json(DONE, done)
            print(f"{title}{' continues' if state == 'begun' else ''}: python {' '.join(stage['command'])}", flush=True)
            began = time.monotonic()
            code = run(stage, state == "begun", stop, lock)
            entry["seconds"] += round(time.monotonic() - began, 3)
            write_json(DONE, done)
            if code and not stop:
                remove(stage["outputs"])  # else they would look like those of a stage that was killed after its end
            if state_of(stage, done) != "done":
                if stop:
                    break
                problem = f"FAILED with exit code {code}; {stage['log']} says why"
        if problem:
            failed.append(name)
        elif not done[name]["files"].keys() >= set(stage["outputs"]):
            done[name]["files"] |= contents(stage["outputs"])
            write_json(DONE, done)
        print(f"{title}: {problem or 'done'}", flush=True)
    else:
        end = f"not done: {', '.join(failed)}" if failed else "copy this folder back"
        print(f"{len(stages) - len(failed)} of {len(stages)} stages are done; {end}")
        return 1 if failed else 0
    print(f"{stop[0]}: run it again to continue with {name}")
    return TO_CONTINUE


def is_called(stage: Stage, name: str) -> bool:
    """Whether it has this name, or one that begins so: "finetune", "attack-eb_jdat"."""
    return f"{stage['name']}-".startswith(f"{name}-")


def reasons_to_stop(minutes: float | None) -> list[str]:
    """Empty until these minutes are over or somebody asks this program to stop."""
    reasons: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda n, _: reasons.append("time is up" if n == signal.SIGALRM else signal.Signals(n).name))
    if minutes is not None:
        signal.setitimer(signal.ITIMER_REAL, max(60 * minutes, 0.001))
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long, to be called again")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="names of stages, or how they begin")
    parser.add_argument("--status", action="store_true", help="say what is done, run nothing")
    options = parser.parse_args()
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 (nothing has checked that before)
            raise UserError(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
        manifest = read(HERE / "box.json", "copy it here again from where the box was packed")
        stages = [stage for stage in manifest["stages"] if not options.only or any(is_called(stage, name) for name in options.only)]
        if unknown := [name for name in options.only if not any(is_called(stage, name) for stage in stages)]:
            raise UserError(f"no stage is called {few(unknown)}; --status lists them")
        # For the stages: this folder's packages, no sender of metrics, and what only the checkout knows.
        os.environ["PYTHONPATH"] = os.pathsep.join([f"{HERE}/src", f"{HERE}/site", os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        os.environ.update(PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
        os.environ.update(EBJDAT_TRACKING="0", EBJDAT_COMMIT=manifest["commit"], EBJDAT_HOST="box")
        with (HERE / ".lock").open("a") as lock:
            if not options.status:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            done = read(DONE, "delete it, and the stages run again") if DONE.exists() else {}
            if not options.status:
                return work(manifest, stages, done, reasons_to_stop(options.minutes), lock.fileno())
        states = [state_of(stage, done) for stage in stages]
        for stage, state in zip(stages, states, strict=True):
            seconds = done.get(stage["name"], {}).get("seconds", 0)
            print(f"  {state:6}  {stage['name']:50} {seconds:6.0f} s")
        print(f"{states.count('done')} of {len(stages)} stages of {manifest['run']} are done")
        return 0
    except BlockingIOError:
        print("another run.py, or a stage of one that was killed, is still running in this folder; wait for it", file=sys.stderr)
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
