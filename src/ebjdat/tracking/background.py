"""The process that sends journals to MLflow beside the stages: one per checkout and store, started by any stage, ends by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from ebjdat.errors import UserError, in_a_line, message, printable
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
    if why := unusable(tracking_uri()):
        with contextlib.suppress(OSError):
            note(why)
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
    with contextlib.suppress(OSError, KeyError, UserError):
        if is_on():
            trouble = read_json(_place("trouble.json"))
            told = f"nothing could be sent to {trouble['uri']} since {trouble['since']} ({trouble['error']})"
            print(
                message(f"WARNING: {told}. Everything is journalled; the next stage sends it, or `ebjdat sync`"),
                file=sys.stderr,
            )


def note(error: str | None) -> None:
    """Leave a word for `warn`, or take it away."""
    place = _place("trouble.json")
    if error is None:
        place.unlink(missing_ok=True)
    elif not place.exists():
        write_json(place, {"uri": shown_uri(), "error": error, "since": time.strftime("%Y-%m-%d %H:%M:%S")})


def unusable(uri: str) -> str | None:
    """Why an SQLite store cannot take anything, which MLflow would find out after minutes; None where it can, or is another store."""
    try:
        return _unusable(uri)
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be looked into
        return in_a_line(error)


def _unusable(uri: str) -> str | None:
    found = re.match(r"sqlite(?:\+\w+)?://(?:/([^?]*))?(?:\?(.*))?", uri)
    if found is None:
        return None
    name, options = (found[1] or "").removeprefix("file:"), dict(parse_qsl(found[2] or ""))
    if name in ("", ":memory:") or options.get("mode") == "memory":
        return "an SQLite store in memory keeps nothing; name a file: sqlite:////folder/mlflow.db"
    if options.get("mode") == "ro" or options.get("immutable") == "1":
        return "the address itself says that nothing may be written"
    path = Path(name)
    if path.exists() and not path.is_file():
        return f"{path} is {'a folder' if path.is_dir() else 'no plain file'}; name a file: sqlite:///{path / 'mlflow.db'}"
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        return f"{path} cannot be written"
    if not path.parent.is_dir():
        return f"the folder {path.parent} is not there"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"nothing can be written in {path.parent}, where SQLite keeps its journal"
    with path.open("rb") if path.exists() else contextlib.nullcontext(io.BytesIO()) as file:
        if file.read(16) not in (b"", b"SQLite format 3\0"):
            return f"{path} is no SQLite database"
    return None


HOST = r"[\w.-]+(?::\d+)?|\[[0-9a-fA-F:.]+\](?::\d+)?"
SHOWN = {"http", "https", "postgresql", "postgres", "mysql", "mssql", "sqlite", "file"}  # schemes whose host and path are no secrets


def masked(uri: str) -> str:
    """Scheme, host, port and path of an address, and nothing else of it: no user, password, query or token."""
    scheme, is_full, rest = uri.partition("://")
    if not is_full:  # databricks, localhost:5000, a folder, user:password@host/path
        place = re.split(r"[?#;]", uri)[0].rpartition("@")[2]
        return printable(place) if "@" not in uri[len(re.split(r"[?#;]", uri)[0]) :] and _is_place(place) else "…"
    if scheme.partition("+")[0].lower() not in SHOWN:
        return f"{printable(scheme)}://…"
    found = re.fullmatch(r"(?:[^/?#@]*@)*([^/?#@]*)(/[^?#;@]*)?((?:[?#;].*)?)", rest, re.DOTALL)
    if found is None or "@" in found[3] or not re.fullmatch(f"({HOST})?", found[1]):
        return f"{printable(scheme)}://…"  # what is the host there cannot be told from a password
    return f"{printable(scheme)}://{found[1]}{printable(found[2] or '')}"


def _is_place(text: str) -> bool:
    """Whether this is a host, with a path or not, or a path; not "name:token"."""
    return re.fullmatch(rf"(?:{HOST})(?:/.*)?|(?:file:)?[^:]*", text, re.DOTALL) is not None


def _secrets() -> set[str]:
    """What must not be shown, wherever it turns up: the tracking address' user, password and query, and MLflow's own."""
    uri = tracking_uri()
    before, _, query = uri.partition("?")
    place = before.partition("://")[2] or before
    found = {os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("TOKEN", "PASSWORD")}
    found |= {value for _, value in parse_qsl(query)} | {query}
    if "@" in place:
        user = place.rpartition("@")[0]
        found |= {user, user.partition(":")[2], unquote(user.partition(":")[2])}
    if masked(uri).endswith("…"):
        found.add(place)
    return {secret for secret in found if len(secret) > 2}


def without_secrets(text: str) -> str:
    """A text in which no address shows more than `masked` does, and nothing that is called a password, key or token its value."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "…")
    text = re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>(),]*", lambda found: masked(found[0]), text)
    text = re.sub(r"[^\s'\"/@(]+@(?=[\w.-]+)", "", text)
    return re.sub(
        r"(?i)([\w-]*(?:key|token|secret|passw(?:or)?d|pwd|auth|signature|credential)[\w-]*['\"]?\s*[=:]\s*)[^&\s,)]+", r"\1…", text
    )


def shown_uri() -> str:
    return masked(tracking_uri())


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
