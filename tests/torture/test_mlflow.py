"""Servers that are down, slow, hang, fail, lose answers, die or never end: training is not touched, and every value arrives once."""

from __future__ import annotations

import contextlib
import http.server
import json
import socketserver
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..tracking.server import Server, free_port
from ..tracking.test_servers import Proxy
from .conftest import Campaign
from .judge import differences
from .lanes import Lane, clear_error, finished, outputs, wait_for, warm

pytestmark = pytest.mark.torture

LARGEST = 1.5e9  # bytes of memory that the process which sends may take
MODES = ("nobody listens", "hangs", "answers 500", "answers without end", "slow", "answers get lost", "dies in the middle")


class Bad(socketserver.ThreadingTCPServer):
    """Takes connections, and does with them what `mode` says."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), BadHandler)
        self.mode = mode
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class BadHandler(http.server.BaseHTTPRequestHandler):
    def do(self) -> None:
        mode = self.server.mode  # type: ignore[attr-defined]
        if mode == "hangs":
            time.sleep(3600)
        if mode == "answers 500":
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * 65536)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def log_message(self, format: str, *args: Any) -> None:
        pass


def senders(lane: Lane) -> list[psutil.Process]:
    """The processes that send this checkout's journals."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(lane.folder) and "ebjdat.tracking.background" in (process.info["cmdline"] or []):
            found.append(process)
    return found


def points(path: Path) -> Counter[tuple[str, int, float]]:
    """What a finished journal says of the curves."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return Counter((k, e["step"], float(v)) for e in events for k, v in e.get("metrics", {}).items())


def arrived(server: Server, run: str) -> Counter[tuple[str, int, float]]:
    client = server.client()
    (stage,) = client.search_runs([client.get_experiment_by_name(run).experiment_id], "tags.kind = 'result-stage'")
    names = [name for name in stage.data.metrics if not name.startswith("system/")]
    found = Counter((m.key, m.step, m.value) for name in names for m in client.get_metric_history(stage.info.run_id, name))
    finals = {k for k in found if k[1] == 0}  # final metrics have no step
    return Counter({k: n for k, n in found.items() if k not in finals})


def trained_beside(campaign: Campaign, server: Server, mode: str, number: int) -> None:
    lane = finished(campaign.reference.folder, campaign.folder / f"mlflow-{number}")
    # a run of its own in the same store; how often states are kept changes no result
    arguments = [*campaign.commands["finetune eb_jdat"], "--override", f"runtime.checkpoint_minutes={number + 1}"]
    made = outputs(arguments)
    for name in made:
        (lane.folder / name).unlink()
    bad = Bad(mode) if mode in MODES[1:4] else None
    proxy = Proxy(server.port)
    proxy.mode = {"slow": "slow", "answers get lost": "lost"}.get(mode, "through")
    uri = bad.uri if bad else f"http://127.0.0.1:{free_port()}" if mode == MODES[0] else proxy.uri
    stop, most = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.2):
            for process in senders(lane):
                with contextlib.suppress(psutil.Error):
                    most[0] = max(most[0], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    with warm(lane) as runner:
        if mode == MODES[-1]:
            threading.Thread(target=lambda: (wait_for(lambda: proxy.calls > 6, 300), setattr(proxy, "mode", "down")), daemon=True).start()
        status = runner.call(arguments, EBJDAT_TRACKING="1", MLFLOW_TRACKING_URI=uri)
    wait_for(lambda: bool(senders(lane)), 20)
    time.sleep(5)  # while it tries
    stop.set()
    watching.join()
    for process in senders(lane):
        process.kill()
    wrong = [] if status == 0 else [f"training ended with {status}: {lane.said().strip()[-200:]}"]
    wrong += differences(campaign.whole, lane.folder)
    wrong += [f"the sender took {most[0] / 1e9:.1f} GB"] if most[0] > LARGEST else []
    for path in (lane.folder / "results").rglob("*.journal.jsonl"):  # of the other stages: they are of another run
        if "eb_jdat" not in str(path) or path.name != "finetune.journal.jsonl":
            path.unlink()
    if bad:  # it is still as it was: said in one line
        status = lane.call("python", "-m", "ebjdat", "sync", EBJDAT_TRACKING="1", MLFLOW_TRACKING_URI=uri)
        wrong += clear_error(lane.said()) if status else ["sync says that all is well"]
        bad.shutdown()
    proxy.mode = "through"
    status = lane.call(
        "python", "-m", "ebjdat", "sync", EBJDAT_TRACKING="1", MLFLOW_TRACKING_URI=server.uri if bad or mode == MODES[0] else proxy.uri
    )
    if status:
        wrong.append(f"sync does not complete: {lane.said().strip()[-200:]}")
    else:
        journal = lane.folder / "results/digits/eb_jdat/seed0/finetune.journal.jsonl"
        run = json.loads(journal.read_text().splitlines()[0])["begin"]["run"]
        expected, found = points(journal), arrived(server, run)
        wrong += [] if found == expected else [f"values differ: {len(expected - found)} missing, {len(found - expected)} too many"]
    proxy.shutdown()
    proxy.server_close()
    campaign.tally.add("mlflow", "server", mode, wrong, "each value once")


def test_bad_servers(campaign: Campaign) -> None:
    server = Server(campaign.folder, f"sqlite:///{campaign.folder / 'served.db'}")
    server.start()
    server.wait()
    try:
        tried = [(mode, i) for i, mode in enumerate(MODES)]
        campaign.side_by_side(lambda each: None if campaign.late() else trained_beside(campaign, server, *each), tried)
    finally:
        server.stop()
    assert not campaign.tally.failed("mlflow")
