"""The process that publishes journals beside the stages: one per checkout and store. Any stage starts it; it ends by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from ebjdat.errors import UserError, message
from ebjdat.files import lock, read_json, write_json
from ebjdat.tracking.address import shown_uri, store_id, tracking_uri, unusable
from ebjdat.tracking.journal import UNFINISHED, is_written, unfinished

LOG = Path("logs/tracking.log")
POLL = 1.0  # seconds between two looks at the journals
MAX_POLL = 30.0  # seconds between two tries of a store that does not answer
PATIENCE = 60.0  # seconds that such a store is tried after the last stage has ended


@cache
def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("mlflow") is not None
    except ImportError:
        return False


def is_on() -> bool:
    """Whether journals are published from here: MLflow is installed, and EBJDAT_TRACKING is not 0."""
    return os.environ.get("EBJDAT_TRACKING", "1") != "0" and _is_installed()


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
    """Leave an error for `warn`; None: remove it."""
    place = _place("trouble.json")
    if error is None:
        place.unlink(missing_ok=True)
    elif not place.exists():
        write_json(place, {"uri": shown_uri(), "error": error, "since": time.strftime("%Y-%m-%d %H:%M:%S")})


def warn() -> None:
    """Print, at the end of a stage, that the store does not answer."""
    with contextlib.suppress(OSError, KeyError, UserError):
        if is_on():
            trouble = read_json(_place("trouble.json"))
            text = f"nothing could be sent to {trouble['uri']} since {trouble['since']} ({trouble['error']})"
            print(message(f"WARNING: {text}. The journals are kept; the next stage sends them, or `ebjdat sync`"), file=sys.stderr)


def wait(seconds: float = 30.0) -> None:
    """Until all journals of this store are published, at most so long; not at all where nothing is published from here."""
    deadline = time.monotonic() + seconds
    while is_on() and unfinished(store_id()) and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> None:
    """Publish until every stage has ended and everything is sent, or the store has not answered for too long."""
    os.nice(5)  # stages come first
    complete = True
    while complete:
        try:
            with lock(_place("sender"), wait=False):
                complete = _publish_until_all_end()
        except BlockingIOError:
            return  # another process does
        if not any(map(is_written, unfinished(store_id()))):  # asked again: a stage may have begun and relied on this process
            return


def _publish_until_all_end() -> bool:
    """Returns whether everything was sent."""
    from ebjdat.tracking.publish import Publisher  # imports MLflow

    publisher, delay, failing_since = Publisher(tracking_uri()), POLL, None
    while True:
        alive = any(map(is_written, unfinished(store_id())))  # before the pass: what stages write until they end is sent in it
        with publishing():
            outcome = publisher.publish(unfinished(store_id()))
        note(outcome.errors[0] if outcome.errors else None)
        if outcome.errors:
            failing_since, delay = failing_since or time.monotonic(), min(2 * delay, MAX_POLL)
        else:
            failing_since, delay = None, POLL
        if not alive and (failing_since is None or time.monotonic() - failing_since > PATIENCE):
            return failing_since is None
        time.sleep(delay)


if __name__ == "__main__":
    main()
