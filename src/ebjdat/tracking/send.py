"""Journals -> MLflow: a run per experiment and seed with all its final metrics, its stages as child runs with the curves.

The store itself says how far each journal was sent (tag `journal_lines` of its run), so nothing is sent twice, whoever
sends and wherever it was broken off; a store that was deleted is simply filled again.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests

from ebjdat.errors import TrackingError, brief
from ebjdat.files import digest
from ebjdat.tracking.background import unusable, without_secrets
from ebjdat.tracking.journal import UNFINISHED, is_written, read

BATCH = 900  # values of one call; MLflow takes 1000
PAGE = 100  # runs of one answer, each some 50 kB
LARGEST, LONGEST = 32 * 2**20, 120.0  # bytes of an answer, and seconds that it may take
CONNECT = 10  # seconds to reach a database
TAG_LENGTH = 4000
NO_END = "lies beside results, where finished ones do, but has no end"
SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"  # folder beside an SQLite store; other stores decide themselves
# MLflow keeps artifacts' addresses whole, so that a store that is copied or moved would go on writing to its old place. Through
# this link of Linux they are in the working folder, whichever that is: the store's, for who sends and for `make ui`.
HERE = f"file:///proc/self/cwd/{ARTIFACTS}"

for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what fails is sent again from the journal, after a look at what has arrived
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)


class _Session(requests.Session):
    """Requests whose answers end: MLflow reads each of them as a whole, however much a server sends."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks["response"].append(_bounded)


def _bounded(response: requests.Response, *_: Any, **__: Any) -> None:
    """Reading this answer raises RequestException once it is too large or takes too long."""
    raw, until = response.raw, time.monotonic() + LONGEST

    def stream(amount: int = 2**16, decode_content: bool | None = None) -> Iterator[bytes]:
        size = 0
        while part := raw.read1(2**16, decode_content=decode_content):
            size += len(part)
            if size > LARGEST or time.monotonic() > until:
                response.close()
                raise requests.RequestException(f"an answer that does not end ({size:,} bytes so far); is this an MLflow server?")
            yield part

    raw.stream = stream
    response.encoding = response.encoding or "utf-8"  # else it is guessed from all bytes, which takes minutes


requests.Session = _Session  # type: ignore[misc] # (of this process, which does nothing but send)

import mlflow  # noqa: E402 (reads these variables)
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag  # noqa: E402

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what a line that says nonsense leads to


@dataclass
class Outcome:
    """What a pass did: journals of which something was sent, values among it, journals that could not be sent and why; and notes."""

    journals: int = 0
    values: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Cursor:
    """Where a journal stands in the store. parent: run of the experiment and seed, for results."""

    run: str
    parent: str | None
    lines: int


class Sender:
    """Sends journals to one store. Every journal is tried, whatever happened to the others."""

    def __init__(self, uri: str) -> None:
        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self._home = Path.cwd()  # journals name files as they are called from here
        self._folder: Path | None = None  # of an SQLite store
        if uri.startswith(SQLITE):
            path = Path(uri.removeprefix(SQLITE)).resolve()
            uri, self._folder = f"{SQLITE}{path}", path.parent
        mlflow.set_tracking_uri(uri)
        self._uri = uri
        self._client: Any = None
        self._experiments: dict[str, str] = {}
        self._cursors: dict[str, _Cursor] = {}
        self._known: set[str] = set()  # MLflow experiments whose runs were looked through
        self._done: dict[Path, tuple[bool, int]] = {}  # journals that were sent as far as they are: is written, size

    def send(self, paths: Iterable[Path]) -> Outcome:
        """Send what is new in these journals, in the order in which they were begun. Finished ones under state/ are then deleted."""
        outcome = Outcome()
        begun = []
        for path in paths:
            with _reading(path, outcome):
                state = (is_written(path), path.stat().st_size)
                if self._done.get(path) != state:
                    opening = read(path, most=1)
                    begun += [(first, path, state) for first in opening]
                    if not opening and not path.is_relative_to(UNFINISHED):
                        if state[1]:
                            raise ValueError(NO_END)
                        outcome.notes.append(f"{path}: empty; its stage could write none when it ran, or it was damaged")
        seen: set[str] = set()
        for first, path, state in sorted(begun, key=lambda found: found[0]["time"]):
            name, events = first["begin"]["id"], []
            if name not in seen:
                with _reading(path, outcome):
                    events = read(path)
                    if not path.is_relative_to(UNFINISHED) and "end" not in events[-1]:
                        events = []
                        raise ValueError(NO_END)
            if not events:
                continue
            seen.add(name)
            try:
                with contextlib.chdir(self._folder or self._home):
                    sent = self._send(events, alive=state[0])
            except Exception as error:  # whatever a store, a server or a network throws
                self._cursors.pop(name, None)  # what has arrived is to be asked again
                self._known.clear()
                self._experiments.clear()
                answers = self._answers()  # then it is this journal that it does not take
                outcome.errors.append(_told(error, f"{path}: " if answers or isinstance(error, DAMAGED) else ""))
                if not answers:
                    break  # the others would only wait for it too
                continue
            self._done[path] = state
            outcome.journals += sent is not None
            outcome.values += sent or 0
            over = events[-1].get("end") in ("FINISHED", "FAILED") or "given_up" in events[-1]
            if over and not state[0] and path.is_relative_to(UNFINISHED):
                path.unlink(missing_ok=True)
        return outcome

    def _send(self, events: list[dict[str, Any]], alive: bool) -> int | None:
        """Returns how many values were sent; None when there was nothing new."""
        self._connect()
        begin = events[0]["begin"]
        cursor = self._cursors.get(begin["id"]) or self._find(events[0]) or self._create(events[0])
        self._cursors[begin["id"]] = cursor
        if cursor.lines == 0:
            self._settings(cursor.run, events[0], with_params=cursor.parent is None)
            if cursor.parent:
                self._client.set_tag(cursor.parent, f"state_{begin['stage']}", "RUNNING")
            self._mark(cursor, 1)
        values, before = 0, cursor.lines
        waiting: list[Metric] = []
        final: list[Metric] = []
        for place, event in enumerate(events[cursor.lines :], cursor.lines + 1):
            waiting += [Metric(k, v, event["time"], event["step"]) for k, v in _values(event).items()]
            final += [Metric(k, v, event["time"], 0) for k, v in event.get("final", {}).items()]
            if len(waiting) + len(final) > BATCH or place == len(events) or not ({"metrics", "system", "final"} & event.keys()):
                values += len(waiting) + len(final)
                if cursor.parent:
                    self._metrics(cursor.parent, final)
                self._metrics(cursor.run, waiting + final)
                self._other(cursor, begin, event)
                self._mark(cursor, place)
                waiting, final = [], []
        if not alive and "end" not in events[-1]:  # its process was killed
            self._state(cursor, begin, "KILLED", events[-1]["time"])
        return values if cursor.lines > before else None

    def _metrics(self, run: str, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run, metrics=metrics[start : start + BATCH])

    def _mark(self, cursor: _Cursor, lines: int) -> None:
        """So far the journal has arrived. A line that arrived without its mark is sent again, which changes nothing."""
        self._client.set_tag(cursor.run, "journal_lines", str(lines))
        cursor.lines = lines

    def adopt(self, paths: Iterable[Path]) -> Outcome:
        """Make the runs of these journals, which lie beside the current results, the ones that are not superseded.

        After `dvc checkout` went back to other results, others would be.
        """
        outcome, begins = Outcome(), []
        for path in paths:
            with _reading(path, outcome):
                begins += [first["begin"] for first in read(path, most=1)]
        try:
            self._connect()
            self._adopt(begins)
        except Exception as error:  # whatever a store, a server or a network throws
            outcome.errors.append(_told(error))
        return outcome

    def _adopt(self, begins: Sequence[Mapping[str, Any]]) -> None:
        for experiment in {begin["run"] for begin in begins}:
            runs = {run.data.tags["journal"]: run for run in self._search(self._experiment(experiment), "tags.journal != ''")}
            for begin in (begin for begin in begins if begin["run"] == experiment and begin["id"] in runs):
                run = runs[begin["id"]]
                if run.data.tags.get("superseded") == "false":
                    continue
                place = run.info.experiment_id
                self._make_current(run, self._current(place, _of_stage(begin)), f"{_title(begin)}/{begin['stage']}")
                if "mlflow.parentRunId" in run.data.tags:
                    parent = self._client.get_run(run.data.tags["mlflow.parentRunId"])
                    self._make_current(parent, self._current(place, f"{_of(begin)} and tags.kind = 'result'"), _title(begin))

    def _make_current(self, run: Any, current: Iterable[Any], name: str) -> None:
        """current: the runs that are current so far; the run itself may be among them."""
        for other in current:
            if other.info.run_id != run.info.run_id:
                self._supersede(other)
        tags = {"superseded": "false", "mlflow.runName": name}
        self._client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()])

    def _connect(self) -> None:
        if self._client is None:
            _reach(self._uri)
            self._client = MlflowClient(self._uri)

    def _answers(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
        except Exception:
            self._client = None
        return self._client is not None

    def _find(self, first: Mapping[str, Any]) -> _Cursor | None:
        """Where a journal stands, if the store knows it. Asks once for all runs of its MLflow experiment."""
        begin = first["begin"]
        if begin["run"] not in self._known:
            experiment = self._experiment(begin["run"])
            for run in self._search(experiment, "tags.journal != ''"):
                tags = run.data.tags
                self._cursors.setdefault(
                    tags["journal"], _Cursor(run.info.run_id, tags.get("mlflow.parentRunId"), int(tags.get("journal_lines", 0)))
                )
            self._known.add(begin["run"])
        return self._cursors.get(begin["id"])

    def _create(self, first: Mapping[str, Any]) -> _Cursor:
        begin = first["begin"]
        experiment = self._experiment(begin["run"])
        tags = {
            **{name: str(value)[:TAG_LENGTH] for name, value in first["tags"].items()},
            "experiment": begin["name"],
            "seed": str(begin["seed"]),
            "dvc_exp": begin["dvc_exp"],
            "host": begin["host"],
            "begun": str(first["time"]),
            "mlflow.source.name": "ebjdat",
            "mlflow.source.git.commit": str(first["tags"].get("git_commit", "")),
        }
        parent = self._parent(experiment, first, tags) if begin["kind"] == "result" else None
        others = self._current(experiment, _of_stage(begin))
        newer = [run for run in others if int(run.data.tags["begun"]) > first["time"]]
        for old in others:
            if old not in newer:
                self._supersede(old)
        own = {"kind": f"{begin['kind']}-stage", "stage": begin["stage"], "superseded": str(bool(newer)).lower(), "journal": begin["id"]}
        if parent:
            own["mlflow.parentRunId"] = parent
        name = f"{_title(begin)}/{begin['stage']}" + (" (superseded)" if newer else "")
        run = self._client.create_run(experiment, start_time=first["time"], run_name=name, tags={**tags, **own}).info.run_id
        return _Cursor(run, parent, 0)

    def _parent(self, experiment: str, first: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """The run of this experiment, seed, settings and data; a new one where there is none, which supersedes those of others."""
        begin = first["begin"]
        found = self._search(experiment, f"{_of(begin)} and tags.kind = 'result'")
        found.sort(key=lambda run: (run.data.tags.get("superseded") == "false", int(run.data.tags["begun"])), reverse=True)
        same = [run for run in found if all(run.data.tags.get(key) == tags.get(key) for key in ("params_hash", "data_hash"))]
        current = [run for run in found if run.data.tags.get("superseded") == "false"]
        again = begin["stage"] == "finetune" and same and any(tag.startswith("event_") for tag in same[0].data.tags)
        if same and not again:  # (what was logged of a training that diverged cannot be taken back)
            run = same[0]
        else:
            made = {**tags, "kind": "result", "superseded": "true"}  # current only once it is whole
            name = f"{_title(begin)} (superseded)"
            run = self._client.create_run(experiment, start_time=first["time"], run_name=name, tags=made)
        if "settings" not in run.data.tags:
            self._settings(run.info.run_id, first)
            self._client.set_tag(run.info.run_id, "settings", "sent")
        others = [other for other in current if other.info.run_id != run.info.run_id]
        if not any(int(other.data.tags["begun"]) > first["time"] for other in others):
            self._client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()])
            self._make_current(run, others, _title(begin))
        return str(run.info.run_id)

    def _settings(self, run: str, first: Mapping[str, Any], with_params: bool = True) -> None:
        """Settings and data set. Stages of a result leave the settings to its run: the UI writes all of them over each picture."""
        params = [Param(name, value[:6000]) for name, value in first["params"].items()] if with_params else []
        for start in range(0, len(params), 100):  # MLflow's limit per call
            self._client.log_batch(run, params=params[start : start + 100])
        if first["data"]:
            data = dict(first["data"])
            entity = Dataset(data.pop("name"), data.pop("digest"), "local", data.pop("source"), profile=str(data))
            context = "training" if first["begin"]["stage"] in ("pretrain", "finetune") else "evaluation"
            self._client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def _other(self, cursor: _Cursor, begin: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """Whatever is not a number."""
        whole = cursor.parent or cursor.run
        if "tag" in event:
            for run in {whole, cursor.run}:
                self._client.set_tag(run, event["tag"][0], event["tag"][1][:TAG_LENGTH])
        elif "artifact" in event and self._unchanged(event["artifact"], event["sha256"]):
            self._client.log_artifact(whole, str(self._home / event["artifact"]))
        elif "picture" in event:
            self._picture(cursor.run, event)
        elif "model" in event and self._unchanged(event["model"], event["sha256"]):
            self._model(whole, event)
        elif "result" in event:
            self._result(begin, event)
        elif "resumed" in event:
            self._client.update_run(cursor.run, status="RUNNING")
            if cursor.parent:
                self._client.set_tag(cursor.parent, f"state_{begin['stage']}", "RUNNING")
        elif "end" in event:
            self._state(cursor, begin, event["end"], event["time"])

    def _state(self, cursor: _Cursor, begin: Mapping[str, Any], status: str, time: int) -> None:
        self._client.set_terminated(cursor.run, status, time)
        if cursor.parent:
            self._client.set_tag(cursor.parent, f"state_{begin['stage']}", status)
            tags = self._client.get_run(cursor.parent).data.tags
            states = {value for name, value in tags.items() if name.startswith("state_")}
            whole = next(state for state in ("FAILED", "KILLED", "RUNNING", "FINISHED") if state in states)
            if whole == "RUNNING":
                self._client.update_run(cursor.parent, status=whole)
            else:
                self._client.set_terminated(cursor.parent, whole, time)

    def _picture(self, run: str, event: Mapping[str, Any]) -> None:
        from PIL import Image

        name = re.compile(rf"images/{re.escape(event['picture'])}.step.{event['step']}.timestamp")  # MLflow's
        if not any(name.match(file.path) for file in self._client.list_artifacts(run, "images")):
            image = Image.open(io.BytesIO(base64.b64decode(event["png"])), formats=("PNG",))
            self._client.log_image(run, image, key=event["picture"], step=event["step"], timestamp=event["time"])

    def _model(self, run: str, event: Mapping[str, Any]) -> None:
        experiment = self._client.get_run(run).info.experiment_id
        newest = self._client.search_logged_models([experiment], f"source_run_id = '{run}'", max_results=1)
        # Asked of the model itself: a mark on the run could get lost after the model was logged.
        if not any(model.tags.get("sha256") == event["sha256"] and model.status == LoggedModelStatus.READY for model in newest):
            from ebjdat.tracking.mlflow_model import log  # with torch, which takes seconds

            log(run, self._home / event["model"], event["sha256"])

    def _result(self, begin: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """Everything of an experiment and seed, on its run, also what stages measured that its settings did not make run again.

        Those stages become that run's children.
        """
        row = event["result"]
        experiment = self._experiment(begin["run"])
        subject = {**begin, "name": row["name"], "seed": row["seed"]}
        found = self._search(experiment, f"{_of(subject)} and tags.kind = 'result'")
        for run in found:
            if all(run.data.tags.get(key) == row["tags"][key] for key in ("params_hash", "data_hash")):
                self._metrics(run.info.run_id, [Metric(k, v, event["time"], 0) for k, v in row["metrics"].items()])
                there = {file.path for file in self._client.list_artifacts(run.info.run_id)}
                for file in row["artifacts"]:
                    if Path(file["artifact"]).name not in there and self._unchanged(file["artifact"], file["sha256"]):
                        self._client.log_artifact(run.info.run_id, str(self._home / file["artifact"]))
                if row["model"] and self._unchanged(row["model"]["model"], row["model"]["sha256"]):
                    self._model(run.info.run_id, row["model"])
                for stage in self._current(experiment, f"{_of(subject)} and tags.kind = 'result-stage'"):
                    if stage.data.tags.get("mlflow.parentRunId") != run.info.run_id:
                        self._client.set_tag(stage.info.run_id, "mlflow.parentRunId", run.info.run_id)
                        self._client.set_tag(run.info.run_id, f"state_{stage.data.tags['stage']}", stage.info.status)

    def _experiment(self, name: str) -> str:
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                location = None
                if self._folder:  # a store outside the checkout is also read from other folders, and stays where it is
                    location = HERE if self._home.is_relative_to(self._folder) else (self._folder / ARTIFACTS).as_uri()
                kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on the runs with their metrics
                self._experiments[name] = str(self._client.create_experiment(name, location, tags=kind))
            else:
                self._refuse_moved(found.artifact_location)
                self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def _refuse_moved(self, location: str) -> None:
        """Raise TrackingError where an SQLite store would have its artifacts written to the place that it was moved from."""
        if self._folder is None or location == HERE or not location.startswith("file:"):
            return
        place = Path(url2pathname(urlsplit(location).path))
        if place.name == ARTIFACTS and place.resolve() != self._folder / ARTIFACTS:
            file = Path(self._uri.removeprefix(SQLITE)).name
            raise TrackingError(
                f"{file} has its artifacts in {place}, not beside it: it was copied or moved here. Rename it; `ebjdat sync` fills a new one"
            )

    def _unchanged(self, path: str, sha256: str) -> bool:
        """Whether this still is the file that the stage wrote; a later run may have replaced it."""
        try:
            return (self._home / path).is_file() and digest(self._home / path) == sha256
        except OSError:
            return False

    def _search(self, experiment: str, text: str) -> list[Any]:
        page = self._client.search_runs([experiment], text, max_results=PAGE)
        found = list(page)
        while page.token:
            page = self._client.search_runs([experiment], text, max_results=PAGE, page_token=page.token)
            found += page
        return found

    def _current(self, experiment: str, text: str) -> list[Any]:
        return self._search(experiment, f"{text} and tags.superseded = 'false'")

    def _supersede(self, run: Any) -> None:
        """Mark a run that a newer one replaces; its history stays."""
        tags = {"superseded": "true", "mlflow.runName": f"{run.info.run_name} (superseded)"}
        self._client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()])
        if run.info.status == "RUNNING":  # its process was killed
            self._client.set_terminated(run.info.run_id, "KILLED")


@contextlib.contextmanager
def _reading(path: Path, outcome: Outcome) -> Iterator[None]:
    """A journal that cannot be read is a word in the outcome; one that was finished and deleted in the meantime is none."""
    try:
        yield
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        outcome.errors.append(f"{path}: cannot be read ({brief(error, 200)}); delete it if it is damaged")


def _told(error: Exception, whose: str = "") -> str:
    """Another program's error in one line, without secrets."""
    first = str(error).splitlines()[0] if str(error) else ""
    return brief(without_secrets(f"{whose}{type(error).__name__}: {first[:2000]}"), 300)


def _of(begin: Mapping[str, Any]) -> str:
    """A filter for runs about the same subject. Trials of `dvc exp` keep to themselves."""
    return f"tags.experiment = {_quoted(begin['name'])} and tags.seed = '{begin['seed']}' and tags.dvc_exp = {_quoted(begin['dvc_exp'])}"


def _of_stage(begin: Mapping[str, Any]) -> str:
    return f"{_of(begin)} and tags.kind = {_quoted(begin['kind'] + '-stage')} and tags.stage = {_quoted(begin['stage'])}"


def _quoted(text: str) -> str:
    """A text in one of MLflow's filters, which have no escapes."""
    if "'" in text and '"' in text:
        raise ValueError(f"{text!r} has both kinds of quotes")
    return f'"{text}"' if "'" in text else f"'{text}'"


def _title(begin: Mapping[str, Any]) -> str:
    trial = f" [{begin['dvc_exp']}]" if begin["dvc_exp"] else ""
    return f"{begin['name']}/seed{begin['seed']}{trial}"


def _values(event: Mapping[str, Any]) -> dict[str, float]:
    return event.get("metrics", {}) | event.get("system", {})


def _reach(uri: str) -> None:
    """Raise TrackingError at once where a database cannot be had; MLflow would try for minutes."""
    if why := unusable(uri):
        raise TrackingError(why)
    kind = uri.partition(":")[0].partition("+")[0]
    if kind in ("postgresql", "mysql", "mssql"):
        from sqlalchemy import create_engine

        try:
            engine = create_engine(uri, connect_args={} if kind == "mssql" else {"connect_timeout": CONNECT})
            engine.connect().close()
            engine.dispose()
        except Exception as error:  # a driver that is not installed, or whatever the driver throws
            raise TrackingError(str(error)) from error
