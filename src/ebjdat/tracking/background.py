"""The process that sends journals to MLflow beside the stages: one per checkout and store, started by any stage, ends by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from ebjdat.files import digest, lock, read_json, write_json
from ebjdat.tracking.journal import UNFINISHED, is_written, unfinished

DEFAULT_STORE = Path("mlflow.db")
LOG = Path("logs/tracking.log")
POLL = 1.0  # seconds between two looks at the journals
LONGEST = 30.0  # seconds between two tries at a store that does not answer
PATIENCE = 60.0  # how long a store that does not answer is tried after the last stage has ended


def is_on() -> bool:
    """Whether journals are sent from here: MLflow is installed, and EBJDAT_TRACKING is not 0."""
    return os.environ.get("EBJDAT_TRACKING", "1") != "0" and _is_installed()


@cache
def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("mlflow") is not None
    except ImportError:
        return False


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE.resolve()}"


def store() -> str:
    """A short name of the store: journals that are meant for it lie in a folder of that name."""
    return digest(tracking_uri())[:12]


def _place(name: str) -> Path:
    """A file about this store, e.g. its lock."""
    return UNFINISHED / f"{store()}.{name}"


def sending() -> contextlib.AbstractContextManager[None]:
    """Held for one pass over the journals, so that two processes never send the same line."""
    return lock(_place("pass"))


def start() -> None:
    """Have a process send what is journalled, unless one does already or nothing is sent from here."""
    if not is_on():
        return
    with contextlib.suppress(BlockingIOError, OSError):
        with lock(_place("sender"), wait=False):
            pass
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with LOG.open("ab") as log:
            subprocess.Popen(  # its own session: Ctrl-C in the terminal and a workflow that ends leave it to finish
                [sys.executable, "-m", "ebjdat.tracking.background"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )


def warn() -> None:
    """Say once per stage that the store does not answer."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if is_on():
            trouble = read_json(_place("trouble.json"))
            print(
                f"WARNING: nothing could be sent to {trouble['uri']} since {trouble['since']} ({trouble['error']}). Everything is "
                "journalled; the next stage sends it, or `ebjdat sync`",
                file=sys.stderr,
            )


def note(error: str | None) -> None:
    """Leave a word for `warn`, or take it away."""
    place = _place("trouble.json")
    if error is None:
        place.unlink(missing_ok=True)
    elif not place.exists():
        write_json(place, {"uri": shown_uri(), "error": error, "since": time.strftime("%Y-%m-%d %H:%M:%S")})


def without_secrets(text: str) -> str:
    """A text in which no address shows a user's password."""
    return re.sub(r"(?i)((?:password|passwd|token|secret)=)[^&\s'\")]+", r"\1…", re.sub(r"://[^/@\s]*@", "://…@", text))


def shown_uri() -> str:
    return without_secrets(tracking_uri())


def wait(seconds: float = 30.0) -> None:
    """Until all journals of this store are sent, or for so long; at once where no process sends."""
    deadline = time.monotonic() + seconds
    while is_on() and unfinished(store()) and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> None:
    """Send until every stage has ended and everything is sent, or the store has not answered for too long."""
    while unfinished(store()):  # asked again after the lock was given back: a stage may have begun and relied on this process
        try:
            with lock(_place("sender"), wait=False):
                done = _until_nothing_is_left()
        except BlockingIOError:
            return  # another one is at work
        if not done or not any(map(is_written, unfinished(store()))):
            return


def _until_nothing_is_left() -> bool:
    from ebjdat.tracking.send import Sender  # imports MLflow

    os.nice(5)  # stages come first
    sender, delay, failing_since = Sender(tracking_uri()), POLL, None
    while True:
        alive = any(map(is_written, unfinished(store())))  # asked before: what is written until they end is sent below
        with sending():
            outcome = sender.send(unfinished(store()))
        if outcome.errors:
            now = time.monotonic()
            failing_since = failing_since or now
            note(outcome.errors[0])
            delay = min(2 * delay, LONGEST)
            if not alive and now - failing_since > PATIENCE:
                return False
        else:
            note(None)
            delay, failing_since = POLL, None
            if not alive:
                return True
        time.sleep(delay)


if __name__ == "__main__":
    main()
