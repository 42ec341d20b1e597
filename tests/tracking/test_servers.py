"""Tracking against real `mlflow server`s on loopback, with SQLite and PostgreSQL behind them, in good and bad times."""

from __future__ import annotations

import contextlib
import glob
import gzip
import http.client
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..conftest import ROOT
from .conftest import run_stage
from .server import Server, answers, free_port, points_of, stage, wait_until

pytestmark = pytest.mark.server


class Proxy(http.server.ThreadingHTTPServer):
    """Between the stages and a server.

    mode: "through"; "slow", 2 s for each call; "lost", where the server does what it was asked and its answer never arrives;
    "down", where nothing gets there.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.mode, self.calls = port, "through", 0
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        proxy: Any = self.server
        proxy.calls += 1
        if proxy.mode == "down":
            self.close_connection = True
            return
        if proxy.mode == "slow":
            time.sleep(2)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=30)
        upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "host"})
        reply = upstream.getresponse()
        content = reply.read()
        if proxy.mode == "lost" and self.command != "GET":
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.getheader("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL of its own on loopback. Root may not run it, so then the account "postgres" does."""
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [str(Path(found).parent) for found in [shutil.which("initdb")] if found]
    if not programs:
        why = "PostgreSQL's server programs (initdb, pg_ctl) are not installed: apt-get install postgresql"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    who = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    data, port = Path(tempfile.mkdtemp(prefix="ebjdat-postgresql-")), free_port()  # where the account can get to
    if who:
        shutil.chown(data, "postgres", "postgres")

    def run(program: str, *arguments: str) -> None:
        subprocess.run([*who, f"{programs[-1]}/{program}", *arguments], cwd="/", check=True, stdout=subprocess.DEVNULL)

    run("initdb", "--pgdata", str(data), "--auth", "trust", "--username", "tracker", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "--pgdata", str(data), "--wait", "--log", str(data / "log"), "--options", options, "start")
    try:
        yield f"postgresql://tracker@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "--pgdata", str(data), "--mode", "immediate", "stop")
        shutil.rmtree(data)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """A server of each kind, for all tests of this file, started when it is first asked for."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Server] = {}

        def get(kind: str) -> Server:
            if kind not in started:
                folder = tmp_path_factory.mktemp(kind)
                store = f"sqlite:///{folder / 'mlflow.db'}"
                if kind == "postgresql":
                    store = stack.enter_context(postgresql())
                started[kind] = Server(folder, store)
                started[kind].start()
                stack.callback(started[kind].stop)
            return started[kind]

        yield get


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Server:
    found = servers(request.param)
    found.wait()
    return found


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.shutdown()
    made.server_close()


def sending(proxy: Proxy) -> dict[str, str]:
    """The variables of a stage that sends to this server."""
    return {"MLFLOW_TRACKING_URI": proxy.uri, "EBJDAT_TRACKING": "1"}


def sync(uri: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    return subprocess.run(
        [sys.executable, "-m", "ebjdat", "sync"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def curve(server: Server, name: str) -> list[tuple[int, float]]:
    (run,) = server.runs(f"tags.kind = 'result-stage' and tags.experiment = '{name}'")
    return [(m.step, m.value) for m in server.client().get_metric_history(run.info.run_id, "loss")]


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)  # one sender writes, whatever the store
def test_four_stages_at_once_and_a_server_that_dies_in_the_middle(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    """Answers get lost, then nothing is reached, then it is back: every value is there, each once, without a word to a stage."""
    prefix = tmp_path.name
    proxy.mode = "lost"
    stages = {f"{prefix}-{i}": stage(f"{prefix}-{i}", tmp_path, 1000, 0.1, **sending(proxy)) for i in range(4)}
    wait_until(lambda: proxy.calls > 3, "calls whose answers get lost")
    proxy.mode = "down"
    wait_until(lambda: bool(list(tmp_path.rglob("*.trouble.txt"))), "the sender sees it")
    (tmp_path / "enough").touch()
    told = [process.communicate() for process in stages.values()]
    assert all(process.returncode == 0 for process in stages.values())
    points = {name: int(out.split()[1]) for name, (out, _) in zip(stages, told, strict=True)}
    assert any("ebjdat sync" in error for _, error in told), told
    failed = sync(proxy.uri, tmp_path)
    assert failed.returncode == 1
    assert "journals could not be sent" in failed.stderr
    assert "Traceback" not in failed.stderr
    proxy.mode = "through"
    done = sync(proxy.uri, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in stages:
        assert curve(server, name) == points_of(points[name])
        (run,) = server.runs(f"tags.kind = 'result' and tags.experiment = '{name}'")
        assert (run.data.metrics, run.info.status) == ({"clean_acc": 0.9}, "FINISHED")
    assert "everything was there already" in sync(server.uri, tmp_path).stdout  # the store knows, by whatever way one gets there


def test_the_next_stage_sends_what_a_server_missed(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    first, second = f"{tmp_path.name}-first", f"{tmp_path.name}-second"
    proxy.mode = "down"
    stage(first, tmp_path, **sending(proxy)).communicate()
    proxy.mode = "through"
    stage(second, tmp_path, pause=0.2, **sending(proxy)).communicate()
    left = tmp_path / "state/tracking"
    wait_until(lambda: not list(left.rglob("*.journal.jsonl")), "sent by itself")
    assert curve(server, first) == curve(server, second) == points_of(5)


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)  # what is behind a slow server makes no difference to a stage
def test_a_slow_server_costs_a_stage_less_than_a_twentieth(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    proxy.mode = "slow"
    name = f"{tmp_path.name}-slow"
    process = stage(name, tmp_path, 1000, 0.1, **sending(proxy))
    wait_until(lambda: proxy.calls > 3, "calls of 2 s each")
    (tmp_path / "enough").touch()
    points, worked, seconds = map(float, process.communicate()[0].split()[1:])
    assert seconds < worked / 0.95
    proxy.mode = "through"
    assert sync(proxy.uri, tmp_path).returncode == 0
    assert curve(server, name) == points_of(int(points))


class Endless(http.server.BaseHTTPRequestHandler):
    """A server whose answers do not end: at full speed, compressed, or a byte now and then."""

    way, sent = "fast", 0

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if Endless.way == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        part = {"fast": b'{"a":1},' * 8192, "gzip": gzip.compress(bytes(2**24)), "slow": b" "}[Endless.way]
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(part)
                Endless.sent += len(part)
                if Endless.way == "slow":
                    time.sleep(0.05)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("way", ["fast", "gzip", "slow"])
def test_an_answer_without_end_is_not_read_on(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most what is allowed is read, whether many bytes come, few that become many, or few in a long time."""
    from ebjdat.tracking import journal, store
    from ebjdat.tracking.publish import Publisher

    run_stage()
    monkeypatch.setattr(Endless, "way", way)
    monkeypatch.setattr(Endless, "sent", 0)
    monkeypatch.setattr(store, "MAX_SECONDS", 1.0 if way == "slow" else 120.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        outcome = Publisher(f"http://127.0.0.1:{server.server_port}").publish(journal.finished())
    finally:
        server.shutdown()
        server.server_close()
    assert len(outcome.errors) == 1
    assert "an answer that does not end" in outcome.errors[0]
    assert Endless.sent < {"fast": 2 * (store.MAX_BYTES + 2**24), "gzip": 2**25, "slow": 1000}[way]  # (with what lies on the way)
    assert len(list(journal.finished())) == 1


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands themselves leave when nothing is sent: data, a pretraining and an EB-JDAT, tiny."""
    folder = tmp_path_factory.mktemp("experiment")
    environment = {**os.environ, "EBJDAT_TRACKING": "0", "PYTHONPATH": str(ROOT / "src")}
    overrides = [str(ROOT / "params/overrides/ci.yaml"), "data.n_train=130", "data.n_test=40", "training.batch_size=32"]
    settings = ["--params", str(ROOT / "params/digits.yaml"), *(word for item in overrides for word in ("--override", item))]

    def ebjdat(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "ebjdat", *arguments], cwd=folder, env=environment, check=True, capture_output=True)

    ebjdat("prepare", *settings, "--out", "data.npz", "--card", "card.json")
    where = ["--seed", "0", "--data", "data.npz"]
    made = ["--out", "results/p.safetensors", "--metrics", "results/pretrain.json", "--curve", "results/p.csv"]
    ebjdat("pretrain", *settings, "--pretraining", "clean", *where, *made)
    made = ["--out", "results/f.safetensors", "--metrics", "results/finetune.json", "--curve", "results/f.csv"]
    ebjdat("finetune", *settings, "--experiment", "eb_jdat", *where, "--initial", "results/p.safetensors", *made)
    assert not list((folder / "state").rglob("*.journal.jsonl"))
    return folder


def sent(server: Server, experiment: Path) -> Any:
    """The run of the experiment's EB-JDAT, sent afterwards, as results from a machine without MLflow are."""
    done = sync(server.uri, experiment)
    assert done.returncode == 0, done.stderr
    found = next(e for e in server.client().search_experiments() if e.name.startswith("digits+"))
    (run,) = server.client().search_runs([found.experiment_id], "tags.kind = 'result'")
    return run


def test_a_whole_experiment_is_on_the_server(server: Server, experiment: Path) -> None:
    run, client = sent(server, experiment), server.client()
    (child,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    recorded = json.loads((experiment / "results/finetune.json").read_text())
    assert run.data.metrics == {k: v for k, v in recorded.items() if k in run.data.metrics}
    assert run.data.params["training.chain.sampler"] == "pyld"
    assert run.data.tags["protocol"].startswith("standard: Linf radius 0.15 in [0, 1]; released: Linf radius 0.075")
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["f.csv"]
    assert client.list_artifacts(child.info.run_id, "images")
    lines = (experiment / "results/f.csv").read_text().splitlines()
    losses = [float(line.split(",")[lines[0].split(",").index("loss")]) for line in lines[1:]]
    np.testing.assert_allclose([m.value for m in client.get_metric_history(child.info.run_id, "loss")], losses, rtol=1e-5)


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)  # what serves a model does not see where it came from
def test_the_model_of_an_experiment_is_served(server: Server, experiment: Path) -> None:
    run, port = sent(server, experiment), free_port()
    command = ["mlflow", "models", "serve", "--model-uri", f"runs:/{run.info.run_id}/model", "--env-manager", "local"]
    serving = subprocess.Popen(
        [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=experiment,
        env={**os.environ, "MLFLOW_TRACKING_URI": server.uri, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ping"), "mlflow models serve")
        with np.load(experiment / "data.npz") as file:
            images = (file["images"][:3] / 255).tolist()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps({"inputs": images}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            rows = json.load(reply)["predictions"]
        assert [set(row) for row in rows] == [{"class", "name", "probability", "energy"}] * 3
        assert all(0.1 < row["probability"] <= 1 for row in rows)
    finally:
        os.killpg(serving.pid, 9)
        serving.wait()
