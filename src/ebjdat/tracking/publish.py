"""Journals -> MLflow: a run per experiment and seed with all its final metrics, its stages as child runs with the curves.

Publishing a journal again changes nothing: runs are found by their tags, and a store keeps one of equal values (key, step, time). So
whatever fails is repeated from the last line that is known to be in the store (tag `journal_lines` of the journal's run), and a store
or run that was deleted is filled again. Of several runs about the same, the one that was begun last is current.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag

from ebjdat.errors import brief
from ebjdat.files import digest
from ebjdat.tracking.address import without_secrets
from ebjdat.tracking.journal import Event, Result, Subject, is_finished, is_written, read
from ebjdat.tracking.store import Store

BATCH = 900  # values of one call; MLflow takes 1000
PAGE = 100  # runs of one answer, each some 50 kB
PARAMS = 100  # of one call, MLflow's limit
PARAM_LENGTH, TAG_LENGTH = 6000, 4000
HASHES = ("params_hash", "data_hash")
PARENT, SENT, OLD = "mlflow.parentRunId", "journal_lines", " (superseded)"


@dataclass
class Outcome:
    """What a pass did: how many journals had something new, which failed and why, and notes."""

    journals: int = 0
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

    @property
    def begun(self) -> int:
        return int(self.tags["begun"])

    def has(self, tags: Mapping[str, str]) -> bool:
        return all((self.tags.get(name) or "") == value for name, value in tags.items())


class Publisher:
    """Publishes journals to one store. Each is tried, whatever happened to the others."""

    def __init__(self, uri: str) -> None:
        self._home = Path.cwd()  # journals name files relative to it
        self._store = Store(uri)
        self._runs: dict[tuple[str, str, int], list[_Run]] = {}  # by subject, as they were found in this pass
        self._done: dict[Path, tuple[bool, int]] = {}  # journals that are published as they are: is written, size

    @property
    def _client(self) -> Any:
        return self._store.client

    def publish(self, paths: Iterable[Path]) -> Outcome:
        """Publish what is new in these journals, in the order in which they began; then delete those under state/ that have ended.

        The runs of journals beside results become the current ones: `dvc checkout` may have gone back to them.
        """
        outcome, begun = Outcome(), []
        self._runs.clear()
        for path in paths:
            with _reading(path, outcome):
                state = (is_written(path), path.stat().st_size)
                if self._done.get(path) != state:
                    begun += [(first.time, first.subject, path, state) for first in read(path, limit=1)]
                if is_finished(path) and not state[1]:
                    outcome.notes.append(f"{path}: empty: its stage could not write it (a full disk?), or it was damaged")
        begun.sort(key=lambda item: item[0])
        results = {(about.run, about.title, about.stage): about.id for _, about, path, _ in begun if is_finished(path)}.values()
        for _, about, path, state in begun:
            events: list[Event] = []
            with _reading(path, outcome):
                events = read(path)
            if not events:
                continue
            try:
                with contextlib.chdir(self._store.folder or self._home):
                    outcome.journals += self._publish(events, is_alive=state[0], is_result=about.id in results)
            except Exception as error:  # whatever a store, a server or a network raises
                self._runs.clear()
                answers = self._store.answers()
                outcome.errors.append(_error(error, f"{path}: " if answers else ""))  # if it answers, it refuses this journal
                if not answers:
                    break
                continue
            if not is_finished(path):
                self._done[path] = state
                if events[-1].end in ("FINISHED", "FAILED") and not state[0]:
                    path.unlink(missing_ok=True)
        return outcome

    def _publish(self, events: list[Event], is_alive: bool, is_result: bool) -> bool:
        """Returns whether there was something new."""
        about, now = events[0].subject, events[-1].time
        run, parent = self._run_of(events[0])
        for one in (parent, run):
            if one and is_result and not one.is_current:
                self._set_tags(one, {"begun": str(int(time.time() * 1000))})
                self._choose_current(about, one)
        new = events[int(run.tags.get(SENT, 0)) :]
        curves = [Metric(k, v, e.time, e.step) for e in new for k, v in (e.metrics or e.system).items()]
        finals = [Metric(k, v, e.time, 0) for e in new for k, v in e.final.items()]
        self._log_metrics(run, curves + finals)
        if parent:
            self._log_metrics(parent, finals)
        for event in new:
            self._log_other(run, parent or run, about, event)
        status = "RUNNING" if is_alive else events[-1].end or "KILLED"
        if status != run.status:
            if parent:
                self._set_tags(parent, {f"state_{about.stage}": status})
                tags = self._client.get_run(parent.id).data.tags  # with what other machines said of other stages
                states = {value for name, value in tags.items() if name.startswith("state_")}
                self._set_status(parent, next(s for s in ("FAILED", "KILLED", "RUNNING", "FINISHED") if s in states), now)
            self._set_status(run, status, now)
        if new:
            self._set_tags(run, {SENT: str(len(events))})  # last: all of it has arrived
        return bool(new)

    def _run_of(self, first: Event) -> tuple[_Run, _Run | None]:
        """The run of a journal, and that of its experiment and seed. A run that is new, or whose parent was deleted, is (re)filled."""
        about = first.subject
        run = next(iter(self._matching(about, {"journal": about.id})), None)
        parent = next((other for other in self._all_runs(about) if run and other.id == run.tags.get(PARENT)), None)
        if run and (parent or about.kind != "result") and SENT in run.tags:
            return run, parent
        tags = {
            **{name: value[:TAG_LENGTH] for name, value in first.tags.items()},
            **_tags(about),
            "host": about.host,
            "begun": str(first.time),
            "mlflow.source.name": "ebjdat",
            "mlflow.source.git.commit": first.tags.get("git_commit", ""),
        }
        if about.kind == "result":
            parent = parent or self._parent(first, tags)
            if parent.begun <= first.time:
                self._set_tags(parent, tags)
            self._choose_current(about, parent)
        run = run or self._create(
            first, f"{about.title}/{about.stage}", {**tags, "kind": f"{about.kind}-stage", "stage": about.stage, "journal": about.id}
        )
        run.status = ""
        run.tags.pop(SENT, None)
        if parent:
            self._set_tags(run, {PARENT: parent.id})
        self._choose_current(about, run)
        self._log_settings(run, first, with_params=parent is None)
        return run, parent

    def _parent(self, first: Event, tags: Mapping[str, str]) -> _Run:
        """The run of this experiment, seed, settings and data; a new one where there is none."""
        about = first.subject
        runs = self._matching(about, {"kind": "result", **{name: tags.get(name, "") for name in HASHES}})
        if about.stage == "finetune":  # what was logged of a training that diverged cannot be taken back
            runs = [run for run in runs if not any(tag.startswith("event_") for tag in run.tags)]
        run = max(runs, key=lambda run: run.begun) if runs else self._create(first, about.title, {**tags, "kind": "result"})
        if "settings" not in run.tags:
            self._log_settings(run, first)
            self._set_tags(run, {"settings": "sent"})
        return run

    def _create(self, first: Event, name: str, tags: Mapping[str, str]) -> _Run:
        """A new run. It counts as superseded until `_choose_current` has chosen it."""
        tags, name = {**tags, "superseded": "true"}, name + OLD
        experiment = self._store.experiment(first.subject.run, self._home)
        made = self._client.create_run(experiment, start_time=first.time, run_name=name, tags=tags)
        run = _Run(made.info.run_id, name, "", tags)
        self._all_runs(first.subject).append(run)
        return run

    def _choose_current(self, about: Subject, run: _Run) -> None:
        """Of the runs about the same as this one, make the one that was begun last the current one."""
        rivals = self._matching(about, {name: run.tags.get(name, "") for name in ("kind", "stage")})
        current = max(rivals, key=lambda rival: (rival.begun, rival is run))
        for rival in rivals:
            if rival.is_current != (rival is current):
                rival.name = rival.name.removesuffix(OLD) + ("" if rival is current else OLD)
                self._set_tags(rival, {"superseded": str(rival is not current).lower(), "mlflow.runName": rival.name})
                if rival is not current and rival.status == "RUNNING":  # its process was killed
                    self._set_status(rival, "KILLED")

    def _set_tags(self, run: _Run, tags: Mapping[str, str]) -> None:
        self._client.log_batch(run.id, tags=[RunTag(*tag) for tag in tags.items()])
        run.tags.update(tags)

    def _log_metrics(self, run: _Run, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run.id, metrics=metrics[start : start + BATCH])

    def _log_settings(self, run: _Run, first: Event, with_params: bool = True) -> None:
        """Data set and settings. A stage leaves the settings to its parent: the UI writes all of them over each picture."""
        params = [Param(name, value[:PARAM_LENGTH]) for name, value in first.params.items()] if with_params else []
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(run.id, params=params[start : start + PARAMS])
        if first.data:
            data = dict(first.data)
            entity = Dataset(data.pop("name"), data.pop("digest"), "local", data.pop("source"), profile=str(data))
            context = "training" if first.subject.stage in ("pretrain", "finetune") else "evaluation"
            self._client.log_inputs(run.id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def _log_other(self, run: _Run, whole: _Run, about: Subject, event: Event) -> None:
        """Log whatever is not a number. whole: the run of experiment and seed, or else the stage's own."""
        if event.tag:
            for one in (run, whole):
                self._set_tags(one, {event.tag[0]: event.tag[1][:TAG_LENGTH]})
        if event.picture:
            self._log_picture(run, event)
        if event.result:
            self._log_result(about, event.result, event.time)
        if event.artifact or event.model:
            self._log_file(whole, event.artifact, event.model, event.sha256)

    def _log_picture(self, run: _Run, event: Event) -> None:
        from PIL import Image

        name = re.compile(rf"images/{re.escape(event.picture)}.step.{event.step}.timestamp")  # MLflow's
        if not any(name.match(file.path) for file in self._client.list_artifacts(run.id, "images")):
            image = Image.open(io.BytesIO(base64.b64decode(event.png)), formats=("PNG",))
            self._client.log_image(run.id, image, key=event.picture, step=event.step, timestamp=event.time)

    def _log_file(self, run: _Run, artifact: str = "", model: str = "", sha256: str = "") -> None:
        """Log an artifact or a model's checkpoint, if it still is what the stage wrote; a later run may have replaced it."""
        path = self._home / (artifact or model)
        try:
            if not path.is_file() or digest(path) != sha256:
                return
        except OSError:
            return
        if artifact:
            self._client.log_artifact(run.id, str(path))
            return
        experiment = self._client.get_run(run.id).info.experiment_id
        models = self._client.search_logged_models([experiment], f"source_run_id = '{run.id}'", max_results=1)  # the newest
        # The model's own tag: one on the run could get lost after the model was logged.
        if not any(model.tags.get("sha256") == sha256 and model.status == LoggedModelStatus.READY for model in models):
            from ebjdat.tracking.mlflow_model import log  # imports torch, which takes seconds

            log(run.id, path, sha256)

    def _log_result(self, about: Subject, row: Result, time: int) -> None:
        """Put all that an experiment and seed has on its run, also from stages that its new settings did not make run again.

        Those stages become that run's children.
        """
        about = replace(about, name=row.name, seed=row.seed)
        for run in self._matching(about, {"kind": "result", **{name: row.tags[name] for name in HASHES}}):
            self._log_metrics(run, [Metric(key, value, time, 0) for key, value in row.metrics.items()])
            for file in [*row.artifacts, *([row.model] if row.model else [])]:
                self._log_file(run, **file)
            for stage in self._matching(about, {"kind": "result-stage", "superseded": "false"}):
                if not stage.has({PARENT: run.id}):
                    self._set_tags(stage, {PARENT: run.id})
                    self._set_tags(run, {f"state_{stage.tags['stage']}": stage.status})

    def _set_status(self, run: _Run, status: str, time: int | None = None) -> None:
        if status == "RUNNING":
            self._client.update_run(run.id, status=status)
        else:
            self._client.set_terminated(run.id, status, time)
        run.status = status

    def _all_runs(self, about: Subject) -> list[_Run]:
        """All runs of an experiment and seed, also those of trials."""
        key = (about.run, about.name, about.seed)
        if key not in self._runs:
            runs, token, experiment = [], None, self._store.experiment(about.run, self._home)
            only = f"tags.experiment = '{about.name}' and tags.seed = '{about.seed}'"
            while True:
                page = self._client.search_runs([experiment], only, max_results=PAGE, page_token=token)
                runs += [_Run(run.info.run_id, run.info.run_name, run.info.status, dict(run.data.tags)) for run in page]
                if not (token := page.token):
                    break
            self._runs[key] = runs
        return self._runs[key]

    def _matching(self, about: Subject, tags: Mapping[str, str]) -> list[_Run]:
        """Runs about the same subject with these tags. Trials of `dvc exp` keep to themselves."""
        return [run for run in self._all_runs(about) if run.has({**_tags(about), **tags})]


def _tags(about: Subject) -> dict[str, str]:
    return {"experiment": about.name, "seed": str(about.seed), "dvc_exp": about.dvc_exp}


@contextlib.contextmanager
def _reading(path: Path, outcome: Outcome) -> Iterator[None]:
    """Report a journal that cannot be read. One that was published and deleted in the meantime is no error."""
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
