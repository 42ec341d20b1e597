"""Copies of one small checkout in which programs are run, killed and gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from ..workflow.conftest import Project, checkout
from .judge import MADE

EXPERIMENTS = ("classifier", "eb_jdat")
PROFILE = "digits"
PATIENCE = 1800.0  # seconds in which any command has to end, also on a busy machine


class Lane(Project):
    """A checkout; what its last program said is in the file `log`."""

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """The leader of a process group of its own."""
        with self.log.open("wb") as out:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def call(self, *command: str, **environment: str) -> int:
        """Run to the end; returns the exit status."""
        process = self.start(*command, **environment)
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            end(process.pid)
            process.wait()
            return 124

    def take_back(self, reference: Path, *names: str) -> None:
        """Put these files of the reference back, with their time stamps."""
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(reference / name, self.folder / name)


def end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def jobs(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Stages at work below a process: `python -m ebjdat …`, and what records (`dvc commit`)."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if words[1:3] == ["-m", "ebjdat"] or (words[2:3] == ["commit"] and Path(words[1]).name == "dvc"):
                    found.append(child)
    return found


def made(folder: Path) -> Lane:
    """The checkout with its two experiments; a training state is kept after every step."""
    project = checkout(folder, *EXPERIMENTS)
    project.change(runtime={"checkpoint_minutes": 0.000001})
    project.commit("states after every step")
    return Lane(folder)


def blank(reference: Path, folder: Path) -> Lane:
    """A copy in which nothing has run."""
    left_out = shutil.ignore_patterns(".snakemake", "cache", "tmp", "dvc.lock", *MADE, "state", "logs", "benchmarks")
    # "data" is also a package of the project, so only names at the top are left out
    shutil.copytree(reference, folder, ignore=lambda at, names: left_out(at, names) if Path(at) in (reference, reference / ".dvc") else ())
    return Lane(folder)


def finished(reference: Path, folder: Path) -> Lane:
    """A copy in which everything has run. The folder may be there, if it is empty."""
    shutil.copytree(reference, folder, dirs_exist_ok=True)
    return Lane(folder)


def stages(lane: Lane) -> dict[str, list[str]]:
    """Stage -> arguments of its `ebjdat` command, as the rules have them: "finetune eb_jdat", "report"."""
    text = lane.run("snakemake", "--dry-run", "--forceall", "--cores", "1", "--printshellcmds", "--nolock")
    found = {}
    for line in re.findall(r"python -m ebjdat (.*?)(?: 2>&1| > )", text):
        words = shlex.split(line)
        about = [words[words.index(f"--{what}") + 1] for what in ("experiment", "pretraining") if f"--{what}" in words]
        found[" ".join([words[0], *about])] = words
    assert found, text
    return found


def outputs(arguments: Sequence[str]) -> list[str]:
    """The files that a stage's command declares, its journal among them."""
    options = ("out", "card", "metrics", "curve", "verdicts", "samples", "grid", "chains", "values", "figure")
    options += ("summary", "table-csv", "table-md", "html", "audit-html", "audit-md")
    read = {"energy": ("samples",), "report": ("card",)}.get(arguments[0], ())
    named = {o: arguments[arguments.index(f"--{o}") + 1] for o in options if f"--{o}" in arguments and o not in read}
    about = {"prepare": "", "pretrain": "metrics", "finetune": "metrics", "report": "html"}.get(arguments[0], "out")
    journal = [str(Path(named[about]).with_suffix(".journal.jsonl"))] if about else []
    return [*named.values(), *journal]


class Warm:
    """Runs `ebjdat` commands in forks of one process (warm.py)."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._errors = lane.folder.with_suffix(".warm").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("warm.py"))],
            cwd=lane.folder,
            env=lane.environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def call(
        self,
        arguments: Sequence[str],
        fault: dict[str, Any] | None = None,
        meanwhile: Callable[[int], None] | None = None,
        **environment: str,
    ) -> int:
        """Run to the end; returns the exit status. meanwhile: called with the process's number."""
        order = {"arguments": list(arguments), "log": str(self.lane.log), "fault": fault, "environment": environment}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        number = self._process.stdout.readline()
        assert number, Path(self._errors.name).read_text()
        if meanwhile is not None:
            meanwhile(int(number))
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


@contextlib.contextmanager
def warm(lane: Lane) -> Iterator[Warm]:
    made = Warm(lane)
    try:
        yield made
    finally:
        made.close()


def clear_error(text: str, *named: str) -> list[str]:
    """What is wrong with a refusal: it has to be one "error:" line, without a traceback, that names one of these."""
    wrong = ["a traceback"] if "Traceback (most recent call last)" in text else []
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if len(lines) != 1:
        wrong.append(f"{len(lines)} error lines")
    elif named and not any(name in lines[0] for name in named):
        wrong.append("the error does not name the file")
    if wrong and lines:
        wrong.append(lines[0][:160])
    elif wrong and text.strip():
        wrong.append(text.strip().splitlines()[-1][:160])
    return wrong


def wait_for(ready: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
