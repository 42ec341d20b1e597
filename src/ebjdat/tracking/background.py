"""The process that publishes journals while stages run: one per checkout and store. Any stage starts it; it ends by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from ebjdat.errors import message
from ebjdat.files import lock, write_text
from ebjdat.tracking.address import shown_uri, store_id, tracking_uri, unusable
from ebjdat.tracking.journal import UNFINISHED, is_written, unfinished

LOG = Path("logs/tracking.log")
POLL = 1.0  # seconds between two looks at the journals
RETRY, TRIES = 10.0, 6  # seconds between two tries of a store that fails, and how often it is tried after the last stage has ended


def is_on() -> bool:
    """Whether journals are published from here: MLflow is installed, and EBJDAT_TRACKING is not 0."""
    return os.environ.get("EBJDAT_TRACKING", "1") != "0" and importlib.util.find_spec("mlflow") is not None


def _place(name: str) -> Path:
    """A file about this store, e.g. its lock."""
    return UNFINISHED / f"{store_id()}.{name}"


def publishing() -> contextlib.AbstractContextManager[None]:
    """Held for one pass over the journals, so that two processes never create the same run."""
    return lock(_place("pass"))


def start() -> None:
    """Start the process, unless it runs already or nothing is published from here."""
    if not is_on():
        return
    with contextlib.suppress(OSError):
        if why := unusable(tracking_uri()):
            note(why)
            return
        with lock(_place("sender"), wait=False):
            pass
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with LOG.open("ab") as log:
            subprocess.Popen(  # a session of its own: Ctrl-C in the terminal and the end of a workflow do not stop it
                [sys.executable, "-m", "ebjdat.tracking.background"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )


def note(error: str | None) -> None:
    """Leave an error for `warn`, or remove it (None)."""
    place = _place("trouble.txt")
    if error is None:
        place.unlink(missing_ok=True)
    elif not place.exists():
        write_text(place, f"nothing could be sent to {shown_uri()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({error})")


def warn() -> None:
    """Print, at the end of a stage, that the store does not answer."""
    with contextlib.suppress(OSError, ValueError):
        if is_on():
            trouble = _place("trouble.txt").read_text(encoding="utf-8")
            print(message(f"WARNING: {trouble}. The journals are kept; the next stage sends them, or `ebjdat sync`"), file=sys.stderr)


def wait(seconds: float = 30.0) -> None:
    """Wait until all journals of this store are published, at most this long; not at all where nothing is published from here."""
    deadline = time.monotonic() + seconds
    while is_on() and unfinished(store_id()) and time.monotonic() < deadline:
        time.sleep(0.2)


def _a_stage_runs() -> bool:
    return any(map(is_written, unfinished(store_id())))


def main() -> None:
    """Publish until every stage has ended and everything is sent, or the store has failed too often."""
    os.nice(5)  # stages come first
    with contextlib.suppress(BlockingIOError):  # another process does it
        while True:
            with lock(_place("sender"), wait=False):
                _publish_until_all_end()
            if not _a_stage_runs():  # asked again: one may have begun and relied on this process
                return


def _publish_until_all_end() -> None:
    from ebjdat.tracking.publish import Publisher  # imports MLflow

    publisher, tries = Publisher(tracking_uri()), TRIES
    while tries:
        runs = _a_stage_runs()  # before the pass: what stages write until they end is sent in it
        with publishing():
            errors = publisher.publish(unfinished(store_id())).errors
        note(errors[0] if errors else None)
        if not (runs or errors):
            return
        tries = TRIES if runs else tries - 1
        time.sleep(RETRY if errors else POLL)


if __name__ == "__main__":
    main()
