"""Journals -> MLflow: a run per experiment and seed with all its final metrics, its stages as child runs with the curves.

Publishing a journal again changes nothing: runs are found by their tags, a store keeps one of equal values (key, step, time), and
files that are there are not sent again. So whatever fails is repeated from the last line that is known to be in the store
(tag `journal_lines` of the journal's run), and a store or run that was deleted is filled again.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag

from ebjdat.errors import brief
from ebjdat.files import digest
from ebjdat.tracking.address import without_secrets
from ebjdat.tracking.journal import UNFINISHED, Begin, Event, Result, is_written, read
from ebjdat.tracking.store import Store

BATCH = 900  # values of one call; MLflow takes 1000
PAGE = 100  # runs of one answer, each some 50 kB
PARAMS = 100  # of one call, MLflow's limit
PARAM_LENGTH, TAG_LENGTH = 6000, 4000
HASHES = ("params_hash", "data_hash")
NO_END = "lies beside results, where finished ones do, but has no end"


@dataclass
class Outcome:
    """What a pass did: journals of which something was sent, values among it, journals that failed and why, and notes."""

    journals: int = 0
    values: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Run:
    """A run in the store."""

    id: str
    name: str
    status: str
    tags: dict[str, str]

    @property
    def is_current(self) -> bool:
        return self.tags.get("superseded") == "false"

    def has(self, tags: Mapping[str, str]) -> bool:
        return all((self.tags.get(name) or "") == value for name, value in tags.items())


class Publisher:
    """Publishes journals to one store. Each is tried, whatever happened to the others."""

    def __init__(self, uri: str) -> None:
        self._home = Path.cwd()  # journals name files relative to it
        self._store = Store(uri)
        self._runs: dict[str, list[_Run]] = {}  # by MLflow experiment
        self._found: dict[str, tuple[_Run, _Run | None]] = {}  # by id of the journal: its run, and the run of experiment and seed
        self._done: dict[Path, tuple[bool, int]] = {}  # journals that are published as they are: is written, size

    @property
    def _client(self) -> Any:
        return self._store.client

    def publish(self, paths: Iterable[Path]) -> Outcome:
        """Publish what is new in these journals, in the order of their beginnings; then delete finished ones under state/.

        The runs of journals beside results become the current ones: `dvc checkout` may have gone back to them.
        """
        outcome, begun = Outcome(), []
        for path in paths:
            with _reading(path, outcome):
                state = (is_written(path), path.stat().st_size)
                if self._done.get(path) != state:
                    if opening := read(path, limit=1):
                        begun.append((opening[0], path, state))
                    elif not path.is_relative_to(UNFINISHED):
                        if state[1]:
                            raise ValueError(NO_END)
                        outcome.notes.append(f"{path}: empty; its stage could write none when it ran, or it was damaged")
        begun.sort(key=lambda item: item[0].time)
        begins = [_begin(first) for first, path, _ in begun if not path.is_relative_to(UNFINISHED)]
        results = {(begin.run, _title(begin), begin.stage): begin.id for begin in begins}.values()  # the newest of each stage
        if any(_begin(first).id not in self._found for first, _, _ in begun):
            self._forget()
        seen: set[str] = set()
        for first, path, state in begun:
            name, events = _begin(first).id, []
            with _reading(path, outcome):
                if name not in seen:
                    events = read(path)
                    if not path.is_relative_to(UNFINISHED) and events[-1].end is None:
                        events = []
                        raise ValueError(NO_END)
            if not events:
                continue
            seen.add(name)
            try:
                with contextlib.chdir(self._store.folder or self._home):
                    sent = self._publish(events, state[0], is_result=name in results)
            except Exception as error:  # whatever a store, a server or a network raises
                self._forget()
                answers = self._store.forget()
                outcome.errors.append(_error(error, f"{path}: " if answers else ""))  # if it answers, it refuses this journal
                if not answers:
                    break
                continue
            if path.is_relative_to(UNFINISHED):
                self._done[path] = state
            outcome.journals += sent is not None
            outcome.values += sent or 0
            is_over = events[-1].end in ("FINISHED", "FAILED") or events[-1].given_up
            if is_over and not state[0] and path.is_relative_to(UNFINISHED):
                path.unlink(missing_ok=True)
        return outcome

    def _forget(self) -> None:
        self._found.clear()
        self._runs.clear()

    def _publish(self, events: list[Event], alive: bool, is_result: bool) -> int | None:
        """Returns how many values were sent; None when there was nothing new."""
        begin, now = _begin(events[0]), events[-1].time
        run, parent = self._found[begin.id] = self._found.get(begin.id) or self._find_or_create(events[0])
        if is_result and not run.is_current:
            self._promote(run, begin, stage=True)
            if parent:
                self._promote(parent, begin, stage=False)
        new = events[int(run.tags.get("journal_lines", 0)) :]
        curves = [Metric(k, v, e.time, e.step) for e in new for k, v in ((e.metrics or {}) | (e.system or {})).items()]
        finals = [Metric(k, v, e.time, 0) for e in new for k, v in e.final.items()]
        self._log_metrics(run.id, curves + finals)
        if parent:
            self._log_metrics(parent.id, finals)
        for event in new:
            self._log_other(run, parent or run, begin, event)
        status = events[-1].end or ("RUNNING" if alive else "KILLED")
        if status != run.status:
            if parent:
                self._set_tags(parent, {f"state_{begin.stage}": status})
                tags = self._client.get_run(parent.id).data.tags  # with what other machines said of other stages
                states = {value for name, value in tags.items() if name.startswith("state_")}
                self._set_status(parent, next(s for s in ("FAILED", "KILLED", "RUNNING", "FINISHED") if s in states), now)
            self._set_status(run, status, now)
        if new:
            self._set_tags(run, {"journal_lines": str(len(events))})  # last: all of it has arrived
        return len(curves) + len(finals) if new else None

    def _find_or_create(self, first: Event) -> tuple[_Run, _Run | None]:
        """The run of a journal, and that of its experiment and seed. A run that is new, or whose parent was deleted, is (re)filled."""
        begin = _begin(first)
        run = next(iter(self._matching(begin, {"journal": begin.id})), None)
        parent = next((other for other in self._all_runs(begin.run) if run and other.id == run.tags.get("mlflow.parentRunId")), None)
        if run and (parent or begin.kind != "result") and "journal_lines" in run.tags:
            return run, parent
        tags = {
            **{name: value[:TAG_LENGTH] for name, value in first.tags.items()},
            **_subject(begin),
            "host": begin.host,
            "begun": str(first.time),
            "mlflow.source.name": "ebjdat",
            "mlflow.source.git.commit": first.tags.get("git_commit", ""),
        }
        if begin.kind == "result":
            parent = parent or self._parent(first, tags)
            if self._promote(parent, begin, stage=False, time=first.time) and int(parent.tags["begun"]) <= first.time:
                self._set_tags(parent, tags)
        own = {"kind": f"{begin.kind}-stage", "stage": begin.stage, "journal": begin.id}
        run = run or self._create(first, f"{_title(begin)}/{begin.stage}", tags | own)
        run.status = ""
        run.tags.pop("journal_lines", None)
        if parent:
            self._set_tags(run, {"mlflow.parentRunId": parent.id})
        self._promote(run, begin, stage=True, time=first.time)
        self._log_settings(run.id, first, with_params=parent is None)
        return run, parent

    def _parent(self, first: Event, tags: Mapping[str, str]) -> _Run:
        """The run of this experiment, seed, settings and data; a new one if there is none."""
        begin = _begin(first)
        runs = self._matching(begin, {"kind": "result", **{name: tags.get(name, "") for name in HASHES}})
        if begin.stage == "finetune":  # what was logged of a training that diverged cannot be taken back
            runs = [run for run in runs if not any(tag.startswith("event_") for tag in run.tags)]
        runs.sort(key=lambda run: (run.is_current, int(run.tags["begun"])))
        run = runs[-1] if runs else self._create(first, _title(begin), {**tags, "kind": "result"})
        if "settings" not in run.tags:
            self._log_settings(run.id, first)
            self._set_tags(run, {"settings": "sent"})
        return run

    def _create(self, first: Event, name: str, tags: Mapping[str, str]) -> _Run:
        """A new run; it is superseded until it is promoted."""
        tags, name = {**tags, "superseded": "true"}, f"{name} (superseded)"
        experiment = self._store.experiment(_begin(first).run, self._home)
        made = self._client.create_run(experiment, start_time=first.time, run_name=name, tags=tags)
        run = _Run(made.info.run_id, name, "", tags)
        self._all_runs(_begin(first).run).append(run)
        return run

    def _promote(self, run: _Run, begin: Begin, stage: bool, time: float = math.inf) -> bool:
        """Make a run the current one of its subject, and of its stage; unless another was begun after this time."""
        kind = {"kind": f"{begin.kind}-stage", "stage": begin.stage} if stage else {"kind": "result"}
        others = [other for other in self._matching(begin, kind) if other.is_current and other.id != run.id]
        if any(int(other.tags["begun"]) > time for other in others):
            return False
        for other in others:
            self._set_tags(other, {"superseded": "true", "mlflow.runName": f"{other.name} (superseded)"})
            if other.status == "RUNNING":  # its process was killed
                self._set_status(other, "KILLED")
        run.name = _title(begin) + (f"/{begin.stage}" if stage else "")
        self._set_tags(run, {"superseded": "false", "mlflow.runName": run.name})
        return True

    def _set_tags(self, run: _Run, tags: Mapping[str, str]) -> None:
        self._client.log_batch(run.id, tags=[RunTag(*tag) for tag in tags.items()])
        run.tags.update(tags)

    def _log_metrics(self, run: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run, metrics=metrics[start : start + BATCH])

    def _log_settings(self, run: str, first: Event, with_params: bool = True) -> None:
        """Data set and settings. A stage leaves the settings to its parent: the UI writes all of them over each picture."""
        params = [Param(name, value[:PARAM_LENGTH]) for name, value in first.params.items()] if with_params else []
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(run, params=params[start : start + PARAMS])
        if first.data:
            data = dict(first.data)
            entity = Dataset(data.pop("name"), data.pop("digest"), "local", data.pop("source"), profile=str(data))
            context = "training" if _begin(first).stage in ("pretrain", "finetune") else "evaluation"
            self._client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def _log_other(self, run: _Run, whole: _Run, begin: Begin, event: Event) -> None:
        """Whatever is not a number. whole: the run of experiment and seed, or else the stage's own."""
        if event.tag:
            for one in (run, whole):
                self._set_tags(one, {event.tag[0]: event.tag[1][:TAG_LENGTH]})
        if event.artifact:
            self._log_artifact(whole.id, event.artifact, event.sha256)
        if event.picture:
            self._log_picture(run.id, event)
        if event.model:
            self._log_model(whole.id, event.model, event.sha256)
        if event.result:
            self._log_result(begin, event.result, event.time)

    def _log_artifact(self, run: str, path: str, sha256: str) -> None:
        if self._is_unchanged(path, sha256):
            self._client.log_artifact(run, str(self._home / path))

    def _log_picture(self, run: str, event: Event) -> None:
        from PIL import Image

        name = re.compile(rf"images/{re.escape(event.picture)}.step.{event.step}.timestamp")  # MLflow's
        if not any(name.match(file.path) for file in self._client.list_artifacts(run, "images")):
            image = Image.open(io.BytesIO(base64.b64decode(event.png)), formats=("PNG",))
            self._client.log_image(run, image, key=event.picture, step=event.step, timestamp=event.time)

    def _log_model(self, run: str, path: str, sha256: str) -> None:
        if not self._is_unchanged(path, sha256):
            return
        experiment = self._client.get_run(run).info.experiment_id
        models = self._client.search_logged_models([experiment], f"source_run_id = '{run}'", max_results=1)  # the newest
        # The model's own tag: one on the run could get lost after the model was logged.
        if not any(model.tags.get("sha256") == sha256 and model.status == LoggedModelStatus.READY for model in models):
            from ebjdat.tracking.mlflow_model import log  # imports torch, which takes seconds

            log(run, self._home / path, sha256)

    def _log_result(self, begin: Begin, row: Result, time: int) -> None:
        """Put all that an experiment and seed has on its run, also from stages that its new settings did not make run again.

        Those stages become that run's children.
        """
        subject = begin.model_copy(update={"name": row.name, "seed": row.seed})
        stages = [run for run in self._matching(subject, {"kind": "result-stage"}) if run.is_current]
        for run in self._matching(subject, {"kind": "result", **{name: row.tags[name] for name in HASHES}}):
            self._log_metrics(run.id, [Metric(key, value, time, 0) for key, value in row.metrics.items()])
            present = {file.path for file in self._client.list_artifacts(run.id)}
            for file in row.artifacts:
                if Path(file["artifact"]).name not in present:
                    self._log_artifact(run.id, file["artifact"], file["sha256"])
            if row.model:
                self._log_model(run.id, row.model["model"], row.model["sha256"])
            for stage in stages:
                if stage.tags.get("mlflow.parentRunId") != run.id:
                    self._set_tags(stage, {"mlflow.parentRunId": run.id})
                    self._set_tags(run, {f"state_{stage.tags['stage']}": stage.status})

    def _set_status(self, run: _Run, status: str, time: int | None = None) -> None:
        if status == "RUNNING":
            self._client.update_run(run.id, status=status)
        else:
            self._client.set_terminated(run.id, status, time)
        run.status = status

    def _all_runs(self, name: str) -> list[_Run]:
        """All runs of an MLflow experiment, asked for again when a journal is new."""
        if name not in self._runs:
            runs, token = [], None
            experiment = self._store.experiment(name, self._home)
            while True:
                page = self._client.search_runs([experiment], "tags.kind != ''", max_results=PAGE, page_token=token)
                runs += [_Run(run.info.run_id, run.info.run_name, run.info.status, dict(run.data.tags)) for run in page]
                if not (token := page.token):
                    break
            self._runs[name] = runs
        return self._runs[name]

    def _matching(self, begin: Begin, tags: Mapping[str, str]) -> list[_Run]:
        """Runs about the same subject with these tags. Trials of `dvc exp` keep to themselves."""
        return [run for run in self._all_runs(begin.run) if run.has({**_subject(begin), **tags})]

    def _is_unchanged(self, path: str, sha256: str) -> bool:
        """Whether this still is the file that the stage wrote; a later run may have replaced it."""
        try:
            return (self._home / path).is_file() and digest(self._home / path) == sha256
        except OSError:
            return False


def _begin(first: Event) -> Begin:
    assert first.begin is not None  # checked by `read`
    return first.begin


def _subject(begin: Begin) -> dict[str, str]:
    return {"experiment": begin.name, "seed": str(begin.seed), "dvc_exp": begin.dvc_exp}


def _title(begin: Begin) -> str:
    trial = f" [{begin.dvc_exp}]" if begin.dvc_exp else ""
    return f"{begin.name}/seed{begin.seed}{trial}"


@contextlib.contextmanager
def _reading(path: Path, outcome: Outcome) -> Iterator[None]:
    """Report a journal that cannot be read; one that was finished and deleted in the meantime is no error."""
    try:
        yield
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        outcome.errors.append(f"{path}: cannot be read ({brief(error, 200)}); delete it if it is damaged")


def _error(error: Exception, where: str = "") -> str:
    """Another program's error in one line, without secrets."""
    first = str(error).splitlines()[0] if str(error) else ""
    return brief(without_secrets(f"{where}{type(error).__name__}: {first[:2000]}"), 300)
