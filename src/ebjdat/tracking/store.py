"""The one place that connects to MLflow: settings of its client, limits on answers, and where artifacts lie."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests

from ebjdat.errors import TrackingError
from ebjdat.tracking.address import unusable

MAX_BYTES, MAX_SECONDS = 32 * 2**20, 120.0  # of an answer
CONNECT_SECONDS = 10  # to reach a database
SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"  # folder beside an SQLite store; other stores decide themselves
# MLflow keeps absolute addresses of artifacts, so that a store that is copied or moved would still write to its old place. This
# link of Linux is the working folder, whichever that is: the publisher and `make ui` work in the store's folder.
HERE = f"file:///proc/self/cwd/{ARTIFACTS}"

for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the next pass sends again what failed
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)


class _Session(requests.Session):
    """Requests with limited answers: MLflow reads an answer as a whole, however much a server sends."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks["response"].append(_limit)


def _limit(response: requests.Response, *_: Any, **__: Any) -> None:
    """Make reading this answer raise RequestException once it is too large or takes too long."""
    raw, until = response.raw, time.monotonic() + MAX_SECONDS

    def stream(amount: int = 2**16, decode_content: bool | None = None) -> Iterator[bytes]:
        size = 0
        while part := raw.read1(2**16, decode_content=decode_content):
            size += len(part)
            if size > MAX_BYTES or time.monotonic() > until:
                response.close()
                raise requests.RequestException(f"an answer that does not end ({size:,} bytes so far); is this an MLflow server?")
            yield part

    raw.stream = stream
    response.encoding = response.encoding or "utf-8"  # guessing it from all bytes takes minutes


requests.Session = _Session  # type: ignore[misc] # in this process, which only publishes

import mlflow  # noqa: E402 (reads these variables)
from mlflow import MlflowClient  # noqa: E402

for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Store:
    """A store at an address. folder: of an SQLite file, and of its artifacts; None for other stores."""

    def __init__(self, uri: str) -> None:
        self.folder: Path | None = None
        if uri.startswith(SQLITE):
            path = Path(uri.removeprefix(SQLITE)).resolve()
            uri, self.folder = f"{SQLITE}{path}", path.parent
        self.uri = uri
        self._client: Any = None
        mlflow.set_tracking_uri(uri)

    @property
    def client(self) -> Any:
        """MLflow's client. Raises TrackingError at once where a database cannot be reached; MLflow would try for minutes."""
        if self._client is None:
            if why := unusable(self.uri):
                raise TrackingError(why)
            _connect(self.uri)
            self._client = MlflowClient(self.uri)
        return self._client

    def answers(self) -> bool:
        """Whether the store answers after a failure; if not, it is connected to anew."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception:
            self._client = None
        return self._client is not None

    def experiment(self, name: str, home: Path) -> str:
        """The id of an MLflow experiment, created where it does not exist. home: the checkout."""
        if found := self.client.get_experiment_by_name(name):
            self._refuse_moved(found.artifact_location)
            return str(found.experiment_id)
        location = None
        if self.folder:  # a store outside the checkout is also read from other folders, and stays where it is
            location = HERE if home.is_relative_to(self.folder) else (self.folder / ARTIFACTS).as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on the runs with their metrics
        return str(self.client.create_experiment(name, location, tags=kind))

    def _refuse_moved(self, location: str) -> None:
        """Raise TrackingError where an SQLite store would write its artifacts to the place that it was moved from."""
        if self.folder is None or location == HERE or not location.startswith("file:"):
            return
        place = Path(url2pathname(urlsplit(location).path))
        if place.name == ARTIFACTS and place.resolve() != self.folder / ARTIFACTS:
            raise TrackingError(
                f"{Path(self.uri.removeprefix(SQLITE)).name} has its artifacts in {place}, not beside it: it was copied or moved here. "
                "Rename it; `ebjdat sync` fills a new one"
            )


def _connect(uri: str) -> None:
    """Raise TrackingError where a database server cannot be reached."""
    kind = uri.partition(":")[0].partition("+")[0]
    if kind in ("postgresql", "mysql", "mssql"):
        from sqlalchemy import create_engine

        try:
            engine = create_engine(uri, connect_args={} if kind == "mssql" else {"connect_timeout": CONNECT_SECONDS})
            engine.connect().close()
            engine.dispose()
        except Exception as error:  # a driver that is not installed, or whatever the driver raises
            raise TrackingError(str(error)) from error
