"""A profile: experiments, the pretrainings they start from, and what their settings are after all merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ebjdat import registry
from ebjdat.files import digest
from ebjdat.settings.data import DataSettings
from ebjdat.settings.evaluation import AttackSettings, Evaluation
from ebjdat.settings.training import ChainSettings, ModelSettings, OptimizerSettings, ScheduleSettings, TrainingSettings, UpdateSettings
from ebjdat.settings.types import EntryName, Epochs, Few, Positive, RandomSeed, Settings, flat, known, merge


class MethodSettings(Settings):
    """A method, the rows of settings it stands on, and what differs from them."""

    method: Annotated[str, known(registry.METHODS)] = "classifier"
    base: Annotated[str, known(registry.BASES)] | None = None  # None: the method's first
    form: Annotated[str, known(registry.FORMS)] | None = None  # None: the method's first
    training: dict[str, Any] = Field(default_factory=dict)  # overrides

    @model_validator(mode="after")
    def rows_of_the_method(self) -> Self:
        method = registry.METHODS[self.method]
        for name, value, allowed in (("base", self.base, method.bases), ("form", self.form, method.forms)):
            if value is not None and value not in allowed:
                raise ValueError(f"method {self.method!r} has no {name} {value!r}; allowed: {', '.join(allowed) or 'none'}")
        return self


class Pretraining(MethodSettings):
    """A training that several experiments may start from; epochs 0 is the fresh, seeded initialisation."""

    epochs: Epochs
    model: dict[str, Any] = Field(default_factory=dict)  # of the profile's network, for every experiment that starts here


class Experiment(MethodSettings):
    method: Annotated[str, known(registry.METHODS)]
    pretraining: str
    note: str | None = None  # shown in the report


class Runtime(Settings):
    """How it is run; nothing here changes a result beyond the arithmetic of the machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Few = 1
    checkpoint_minutes: Positive = 5.0


class ReportSettings(Settings):
    paper: Literal["cifar10", "cifar100", "imagenet_subset"] | None = None  # whose numbers stand beside ours


class Profile(Settings):
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    # this profile's values of the JEM family's rows
    bases: dict[Annotated[str, known(registry.BASES)], dict[str, Any]] = Field(default_factory=dict)
    pretraining: dict[EntryName, Pretraining] = Field(min_length=1, max_length=1000)
    experiments: dict[EntryName, Experiment] = Field(min_length=1, max_length=1000)
    seeds: tuple[RandomSeed, ...] = Field(min_length=1, max_length=1000)
    evaluation: Evaluation
    runtime: Runtime = Runtime()
    report: ReportSettings = ReportSettings()

    def pretraining_settings(self, name: str) -> TrainingSettings:
        entry = self.pretraining[name]
        return self._training(entry, {"epochs": entry.epochs})

    def training_settings(self, experiment: str) -> TrainingSettings:
        return self._training(self.experiments[experiment])

    def _training(self, entry: MethodSettings, *more: Mapping[str, Any]) -> TrainingSettings:
        layers = training_layers(self.training.model_dump(), self.bases, entry.method, entry.base, entry.form, entry.training)
        return TrainingSettings.model_validate(merge(*layers, *more))

    def model_settings(self, pretraining: str) -> ModelSettings:
        """The network of a pretraining and of every experiment that starts from it."""
        return ModelSettings.model_validate(merge(self.model.model_dump(), self.pretraining[pretraining].model))

    def attack_settings(self, experiment: str) -> AttackSettings:
        """What the experiment's robustness is measured with."""
        entry = self.experiments[experiment]
        return self.evaluation.attack.on(base_of(entry.method, entry.base))

    def resolved(self, experiment: str) -> dict[str, Any]:
        """Everything that determines an experiment's results, except its seed, with defaults filled in and overrides applied."""
        entry = self.experiments[experiment]
        pretraining = self.pretraining[entry.pretraining]
        settings = self.pretraining_settings(entry.pretraining)
        return {
            "data": self.data.model_dump(exclude={"path", "root", "label"}),
            "model": self.model_settings(entry.pretraining).model_dump(),
            "pretraining": {"method": pretraining.method, **settings.model_dump()} if pretraining.epochs else {"epochs": 0},
            "method": entry.method,
            "training": self.training_settings(experiment).model_dump(),
            "evaluation": self.evaluation.model_dump(),
        }

    def params_hash(self, experiment: str, seed: int) -> str:
        return digest(self.resolved(experiment), seed)[:16]


def base_of(method: str, base: str | None) -> str | None:
    """The row of the JEM family that a method stands on: the one that was asked for, or its first, if it has any."""
    bases = registry.METHODS[method].bases
    return base or (bases[0] if bases else None)


def form_of(method: str, form: str | None) -> str | None:
    """The form of a method: the one that was asked for, or its first, if it has any."""
    forms = registry.METHODS[method].forms
    return form or (forms[0] if forms else None)


def form_values(form: str, base: str | None) -> dict[str, Any]:
    """Settings of a form on a row of the JEM family."""
    row = registry.FORMS[form]
    return merge(row.defaults, row.on.get(base or "", {}))


def section_names(profile: Profile, job: Mapping[str, str]) -> dict[str, str]:
    """A workflow job's wildcards and "base", by which rules name the sections of the profile that they read."""
    entry: MethodSettings | None = None
    if "experiment" in job:
        entry = profile.experiments[job["experiment"]]
    elif "pretraining" in job:
        entry = profile.pretraining[job["pretraining"]]
    return {**job, "base": (entry and base_of(entry.method, entry.base)) or "none"}


def training_layers(
    training: Mapping[str, Any],
    bases: Mapping[str, Mapping[str, Any]],
    method: str,
    base: str | None,
    form: str | None,
    own: Mapping[str, Any],
) -> list[Mapping[str, Any]]:
    """What a training's settings are merged from, weakest first.

    The profile's `training`, the base's published row, the profile's values for that base, the method's defaults, the form,
    and the experiment's own settings.
    """
    entry = registry.METHODS[method]
    row = base_of(method, base)
    shape = form_of(method, form)
    return [
        training,
        *([registry.BASES[row].defaults, bases.get(row, {})] if row else []),
        entry.defaults,
        *([form_values(shape, row)] if shape else []),
        own,
    ]


ROWS: Mapping[str, Mapping[str, registry.Preset]] = {"base": registry.BASES, "form": registry.FORMS}

# Chain settings that only samplers read, and those of the profile's training.chain that no training would ever see: every row
# of BASES either sets them itself or has a sampler that does not read them.
READ_BY_SAMPLERS = frozenset(key for sampler in registry.SAMPLERS.values() for key in sampler.reads)
NEVER_USED = frozenset(
    key
    for key in ("sampler", "start", "mode", *READ_BY_SAMPLERS)
    if all(
        key in row.defaults["chain"] or (key in READ_BY_SAMPLERS and key not in registry.SAMPLERS[row.defaults["chain"]["sampler"]].reads)
        for row in registry.BASES.values()
    )
)


def catalogue() -> dict[str, dict[str, dict[str, Any]]]:
    """Every strategy by kind and name: its source, its implementation, and its defaults (what a profile may override)."""

    def entries(names: Mapping[str, registry.Entry], section: type[BaseModel] | None = None) -> dict[str, dict[str, Any]]:
        defaults = section.model_construct().model_dump() if section else {}
        return {
            name: {"source": e.source, "implementation": e.target, "defaults": {key: defaults[key] for key in e.reads}}
            for name, e in names.items()
        }

    methods = {
        name: {
            "source": m.source,
            "implementation": m.target,
            "samples": list(m.samples),
            "selection": m.selection,
            "bases": list(m.bases),
            "forms": list(m.forms),
            "defaults": merge({}, *training_layers({}, {}, name, None, None, {})),
        }
        for name, m in registry.METHODS.items()
    }
    rows = {
        kind: {name: {"source": row.source, "on": flat(row.on), "defaults": dict(row.defaults)} for name, row in names.items()}
        for kind, names in (("bases", registry.BASES), ("forms", registry.FORMS))
    }
    return {
        "methods": methods,
        **rows,
        "samplers": entries(registry.SAMPLERS, ChainSettings),
        "starts": entries(registry.STARTS),
        "scores": entries(registry.SCORES),
        "updates": entries(registry.UPDATES, UpdateSettings),
        "optimizers": entries(registry.OPTIMIZERS, OptimizerSettings),
        "schedules": entries(registry.SCHEDULES, ScheduleSettings),
    }
