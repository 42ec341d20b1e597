"""Runs `ebjdat` commands in forks of a process that has imported everything, which saves seconds each; run in a checkout.

A line of JSON comes in: arguments, where output goes, and a fault. Its process's number goes out, then its exit status.

A fault strikes at the first write below the working folder that is not among those it `seen`: a file that is opened for
writing, or moved to its place; with `only`, at the first that this pattern fits. "kill": the process kills itself, after the
opening or before the move. "fill": the disk gets full but for `left` pages. Which write it was is written to the file `told`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = (
    *(f"ebjdat.stages.{name}" for name in ("prepare", "train", "attack", "evaluate", "reliability", "report")),
    *("ebjdat.cli", "ebjdat.report.figures", "ebjdat.evaluation.generate", "scipy.linalg", "torch_fidelity", "sklearn.datasets"),
)
FILLER = ".filler"


def fill(left: int) -> None:
    """Leave so many pages of the disk that holds the working folder."""
    disk = os.statvfs(".")
    size = disk.f_bavail * disk.f_frsize - left * disk.f_frsize
    if size > 0:
        with open(FILLER, "ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), size)


def arm(do: str, told: str, seen: Sequence[str] = (), only: str = "", left: int = 0) -> None:
    here, times, done = str(Path.cwd()) + "/", Counter[str](), []
    me = os.getpid()

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if done or event not in ("open", "os.rename") or os.getpid() != me:
            return
        if event == "open" and (not isinstance(arguments[0], str | bytes | os.PathLike) or not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.path.abspath(os.fsdecode(arguments[event == "os.rename"]))
        if not path.startswith(here):
            return
        # names without the process's number, and without what is drawn for a journal
        name = re.sub(r"\.\d+\.tmp", ".tmp", re.sub(r"-[0-9a-f]{8}(?=\.journal)", "", path.removeprefix(here)))
        times[event + name] += 1
        key = f"{'open' if event == 'open' else 'move'} {name} {times[event + name]}"
        if key in seen or times[event + name] > 3 or not re.search(only, key):
            return
        done.append(key)
        Path(told).write_text(key)
        if do == "fill":
            fill(left)
        elif event == "open":
            sys.setprofile(die)  # strikes at the next call or return: the file is open, and empty
        else:
            die()

    sys.addaudithook(hook)


def become(order: dict[str, Any]) -> int:
    """Run the command here; returns its exit status."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order.get("environment", {}))
    from ebjdat.cli import app

    if order.get("fault"):
        arm(**order["fault"])
    try:
        app(order["arguments"], prog_name="ebjdat")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    out = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = become(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        for value in (child, None):
            number = child if value else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(number, file=out, flush=True)


if __name__ == "__main__":
    main()
