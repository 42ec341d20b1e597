"""Stages and real `mlflow server`s as processes of their own, for tests of tracking and of the UI."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGE = """
import sys, time
from pathlib import Path
from ebjdat.tracking.journal import Subject
from ebjdat.tracking.tracker import Tracker
name, data, points, pause, hold = *sys.argv[1:3], *map(float, sys.argv[3:])
params, tags = {"training": {"lr": 0.1}}, {"git_commit": "abc", "params_hash": name, "data_hash": data}
began, worked, step = time.perf_counter(), 0.0, 0
with Tracker(Subject("digits", name, 0, "finetune"), params, tags, Path(f"results/{name}.journal.jsonl")) as tracker:
    while step < points and not Path("enough").exists():
        tracker.metrics({"loss": 100.0 - step, "acc": step / 100}, step)
        now = time.perf_counter()
        time.sleep(pause)
        worked, step = worked + time.perf_counter() - now, step + 1
    tracker.final({"clean_acc": 0.9})
    print("ready", flush=True)
    time.sleep(hold)
print(step, worked, time.perf_counter() - began)
"""


def stage(name: str, folder: Path, points: int = 5, pause: float = 0.0, hold: float = 0.0, data: str = "d", **variables: str) -> Any:
    """A process that runs a stage in a folder, until its points are done or the file "enough" is there; then it holds before its end."""
    command = [sys.executable, "-c", STAGE, name, data, *map(str, (points, pause, hold))]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def points_of(count: int) -> list[tuple[int, float]]:
    """Such a stage's curve "loss"."""
    return [(step, 100.0 - step) for step in range(count)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
        return bool(reply.status == 200)
    return False


class Server:
    """An `mlflow server`, started as `make ui` starts it; what it says is in server.log."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store, self.port = folder, store, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store]  # artifacts go to mlartifacts/ in its working folder
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.folder, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        def ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()
            return answers(f"{self.uri}/health")

        wait_until(ready, f"mlflow server on {self.store}")

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)  # the server and its workers
            self._process.wait()

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, text: str = "") -> list[Any]:
        client = self.client()
        return list(client.search_runs([client.get_experiment_by_name("digits").experiment_id], text))
