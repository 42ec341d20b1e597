"""The tracking address: which store it names, why that store cannot be used, and what of it may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from ebjdat.errors import in_a_line, printable
from ebjdat.files import digest

DEFAULT_STORE = Path("mlflow.db")
HOST = r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?"
SCHEMES = r"(?:https?|postgres(?:ql)?|mysql|mssql|sqlite|file)(?:\+\w+)?"  # those whose host and path are no secrets
ADDRESS = re.compile(rf"({SCHEMES}://)(?:[^/?#@]*@)*({HOST})?(/[^?#;@]*)?(?:[?#;][^@]*)?", re.IGNORECASE | re.DOTALL)
PLACE = re.compile(rf"{HOST}(?:/[^?#;@]*)?|(?:file:)?[^:?#;@]*", re.DOTALL)  # databricks, localhost:5000, a folder
NAMED_VALUE = r"(?i)([\w-]*(?:key|token|secret|passw(?:or)?d|pwd|auth|signature|credential)[\w-]*['\"]?\s*[=:]\s*)[^&\s,)]+"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE.resolve()}"


def store_id() -> str:
    """A short name of the store: journals meant for it lie in a folder of that name."""
    return digest(tracking_uri())[:12]


def unusable(uri: str) -> str | None:
    """Why an SQLite store cannot be written, which MLflow would notice after minutes; None if it can, and for other stores."""
    found = re.match(r"sqlite(?:\+\w+)?://(?:/([^?]*))?(?:\?(.*))?", uri)
    try:
        return found and _unusable((found[1] or "").removeprefix("file:"), dict(parse_qsl(found[2] or "")))
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be read
        return in_a_line(error)


def _unusable(name: str, options: dict[str, str]) -> str | None:
    path, folder = Path(name), Path(name).parent
    if name in ("", ":memory:") or options.get("mode") == "memory":
        return "an SQLite store in memory keeps nothing; name a file: sqlite:////folder/mlflow.db"
    if options.get("mode") == "ro" or options.get("immutable") == "1":
        return "the address itself makes it read-only"
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    if path.exists() and not path.is_file():
        return f"{path} is {'a folder' if path.is_dir() else 'not a plain file'}; name a file: sqlite:///{path / 'mlflow.db'}"
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        return f"{path} is not writable"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder}, where SQLite keeps its journal, is not writable"
    if path.exists():
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                return f"{path} is not an SQLite database"
    return None


def masked(uri: str) -> str:
    """Scheme, host, port and path of an address: no user, password, query or token; "…" where these cannot be told apart."""
    if found := ADDRESS.fullmatch(uri):
        return printable(f"{found[1]}{found[2] or ''}{found[3] or ''}")
    scheme, is_full, _ = uri.partition("://")
    if is_full:
        return f"{printable(scheme)}://…"
    return printable(uri) if PLACE.fullmatch(uri) else "…"


def _secrets() -> set[str]:
    """User, password and query of the tracking address, and the token and password of MLflow's own variables."""
    uri = tracking_uri()
    address, _, query = uri.partition("?")
    place = address.partition("://")[2] or address
    user = place.rpartition("@")[0]
    password = user.partition(":")[2]
    found = {query, user, password, unquote(password), *(value for _, value in parse_qsl(query))}
    found |= {os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("TOKEN", "PASSWORD")}
    if masked(uri).endswith("…"):
        found.add(place)
    return {secret for secret in found if len(secret) > 2}


def without_secrets(text: str) -> str:
    """A text whose addresses are `masked`, without values that are named a password, key or token."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "…")
    text = re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>(),]*", lambda found: masked(found[0]), text)
    text = re.sub(r"[^\s'\"/@(]+@(?=[\w.-]+)", "", text)
    return re.sub(NAMED_VALUE, r"\1…", text)


def shown_uri() -> str:
    return masked(tracking_uri())
