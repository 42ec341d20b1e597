"""A profile: experiments, the pretrainings they start from, and the settings that each of them ends up with.

`inherited` merges, `ProfileFile` validates, `resolve` assembles: each happens once per profile, and in this order (see loading.load).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ebjdat import registry
from ebjdat.files import digest
from ebjdat.settings.data import DataSettings
from ebjdat.settings.evaluation import AttackSettings, Evaluation
from ebjdat.settings.training import ModelSettings, TrainingSettings
from ebjdat.settings.types import EntryName, Epochs, Few, Positive, RandomSeed, Settings, known, mapping, merge, one_or_more

OF_TRAINING = ("model", "pretraining", "method", "training", "teacher")  # what an experiment's checkpoint is made from, beside data
RESERVED = "pretraining"  # results/<profile>/pretraining holds the shared pretrainings
Base = Annotated[str, known(registry.BASES)]
Form = Annotated[str, known(registry.FORMS)]


def not_reserved(name: str) -> str:
    if name == RESERVED:
        raise ValueError("this name is reserved for the folder of pretrainings; use another")
    return name


class MethodSettings(Settings):
    method: Annotated[str, known(registry.METHODS)] = "classifier"
    base: Base | None = None  # None: the method's first
    form: Form | None = None  # None: the method's first
    training: TrainingSettings  # in the file: what differs from the inherited settings

    @model_validator(mode="after")
    def presets_of_the_method(self) -> Self:
        method = registry.METHODS[self.method]
        for name, value, allowed in (("base", self.base, method.bases), ("form", self.form, method.forms)):
            if value is not None and value not in allowed:
                raise ValueError(f"method {self.method!r} has no {name} {value!r}; allowed: {', '.join(allowed) or 'none'}")
        score = self.training.adversary.score
        asks = [f"method {self.method!r}"] if method.family == "distilled" else []
        asks += [f"score {score!r}"] if "adversarial" in method.samples and "teacher" in registry.SCORES[score].reads else []
        if asks and self.training.teacher is None:
            raise ValueError(f"training.teacher: {asks[0]} needs one; name an `experiment` of this profile in it, or a `model`")
        if self.training.teacher and not asks:
            raise ValueError(f"training.teacher: nothing reads it here; method {self.method!r} and score {score!r} learn from no teacher")
        for name in ("compile", "recompute"):
            if method.second_order and getattr(self.training.compute, name):
                raise ValueError(
                    f"training.compute.{name} cannot differentiate the network's derivatives, which are in the loss of method "
                    f"{self.method!r}; set it to false there"
                )
        weights = self.training.weights
        weighs_examples = "examples" in method.reads and "targets" not in method.reads  # S2O's control is of its targets
        if weights.control != "none" and weighs_examples and weights.examples.name == "uniform":
            raise ValueError(f"training.weights.control {weights.control!r} changes nothing: training.weights.examples is uniform")
        if "policy" in method.samples and not self.training.adversary.project:
            raise ValueError("training.policy.eps limits nothing: training.adversary.project is false")
        return self


class PretrainingSettings(MethodSettings):
    """A training that several experiments may start from; 0 epochs is the seeded random initialisation."""

    epochs: Epochs
    model: ModelSettings  # in the file: what differs from the profile's network


class ExperimentSettings(MethodSettings):
    method: Annotated[str, known(registry.METHODS)]
    pretraining: str
    note: str | None = None  # shown in the report
    # experiments that it has to beat, each of which differs only in what the method claims to matter
    control: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = ()


class Runtime(Settings):
    """How jobs run; changes results at most by the machine's arithmetic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Few = 1
    checkpoint_minutes: Positive = 5.0


class ReportSettings(Settings):
    paper: Literal["cifar10", "cifar100", "imagenet_subset"] | None = None  # whose published numbers the tables show


class ProfileFile(Settings):
    """The schema of a profile's file, with overrides and inheritance applied.

    Validated with a dict as context, it leaves its valid `data` and `evaluation` there; later sections are checked against `data`.
    """

    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    bases: dict[Base, TrainingSettings] = Field(default_factory=dict)  # in the file: values of the JEM family's presets
    pretraining: dict[EntryName, PretrainingSettings] = Field(min_length=1, max_length=1000)
    experiments: dict[Annotated[EntryName, AfterValidator(not_reserved)], ExperimentSettings] = Field(min_length=1, max_length=1000)
    seeds: tuple[RandomSeed, ...] = Field(min_length=1, max_length=1000)
    evaluation: Evaluation
    runtime: Runtime = Runtime()
    report: ReportSettings = ReportSettings()

    @field_validator("data", "evaluation")
    @classmethod
    def keep(cls, value: Settings, info: ValidationInfo) -> Settings:
        if info.context is not None:
            info.context[info.field_name] = value
        return value

    @field_validator("seeds")
    @classmethod
    def distinct(cls, seeds: Sequence[int]) -> Sequence[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("duplicate seed; name each once")
        return seeds


@dataclass(frozen=True)
class Pretraining:
    """A pretraining with everything that it inherits."""

    method: str
    model: ModelSettings
    training: TrainingSettings


@dataclass(frozen=True)
class Experiment:
    """An experiment with everything that it inherits.

    pretraining: name of the one it starts from. control: of the experiments that it has to beat. own: the training settings that it
    states itself.
    resolved: all settings that determine its results, except the seed.
    """

    method: str
    base: str | None
    form: str | None
    pretraining: str
    note: str | None
    control: tuple[str, ...]
    own: Mapping[str, Any]
    model: ModelSettings
    training: TrainingSettings
    attack: AttackSettings
    resolved: Mapping[str, Any]

    def params_hash(self, seed: int) -> str:
        return digest(self.resolved, seed)[:16]


@dataclass(frozen=True)
class Profile:
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    pretraining: dict[str, Pretraining]
    experiments: dict[str, Experiment]
    seeds: tuple[int, ...]
    evaluation: Evaluation
    runtime: Runtime
    report: ReportSettings

    def pretraining_settings(self, name: str) -> TrainingSettings:
        return self.pretraining[name].training

    def training_settings(self, experiment: str) -> TrainingSettings:
        return self.experiments[experiment].training

    def model_settings(self, pretraining: str) -> ModelSettings:
        return self.pretraining[pretraining].model

    def attack_settings(self, experiment: str) -> AttackSettings:
        return self.experiments[experiment].attack

    def resolved(self, experiment: str) -> Mapping[str, Any]:
        return self.experiments[experiment].resolved

    def teachers_first(self) -> list[str]:
        """The experiments' names, each after the one that teaches it."""

        def distance(name: str) -> int:
            teacher = self.experiments[name].training.teacher
            return 1 + distance(teacher.experiment) if teacher and teacher.experiment else 0

        return sorted(self.experiments, key=distance)

    def params_hash(self, experiment: str, seed: int) -> str:
        return self.experiments[experiment].params_hash(seed)


def inherited(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Raw settings with every training and network merged over what it inherits. Malformed parts stay, for validation to refuse."""
    result = dict(raw)
    for kind in ("pretraining", "experiments"):
        if isinstance(raw.get(kind), Mapping):
            result[kind] = {name: _inherited_entry(raw, kind, entry) for name, entry in raw[kind].items()}
    if isinstance(raw.get("bases"), Mapping):
        training = mapping(raw.get("training"))
        result["bases"] = {
            base: merge(training, registry.BASES[base].defaults if base in registry.BASES else {}, own) if isinstance(own, Mapping) else own
            for base, own in raw["bases"].items()
        }
    return result


def _inherited_entry(raw: Mapping[str, Any], kind: str, entry: Any) -> Any:
    """A raw pretraining or experiment with its whole training, its base, its form, and (a pretraining) its whole network."""
    own = entry.get("training", {}) if isinstance(entry, Mapping) else None
    if not isinstance(own, Mapping):
        return entry
    method, base, form = (str(entry.get(key)) for key in ("method", "base", "form"))  # (any value, until it is validated)
    method = method if method in registry.METHODS else "classifier"
    row, shape = base_of(method, base if base in registry.BASES else None), form_of(method, form if form in registry.FORMS else None)
    on_base = mapping(mapping(raw.get("bases")).get(row or ""))
    result = {**entry, "training": merge(mapping(raw.get("training")), *presets(method, row, shape, on_base), own)}
    result |= {key: name for key, name in (("base", row), ("form", shape)) if entry.get(key) is None}
    if kind == "pretraining":
        if "epochs" in entry:
            result["training"]["epochs"] = entry["epochs"]
        if isinstance(entry.get("model", {}), Mapping):
            result["model"] = merge(mapping(raw.get("model")), entry.get("model", {}))
    return result


def resolve(file: ProfileFile, raw: Mapping[str, Any]) -> Profile:
    """The profile of a valid file. raw: its settings before inheritance, where an experiment's own settings are."""
    pretraining = {name: Pretraining(entry.method, entry.model, entry.training) for name, entry in file.pretraining.items()}
    data, evaluation = file.data.model_dump(exclude={"path", "root", "label", "extra"}), file.evaluation.model_dump()

    def experiment(name: str) -> Experiment:
        entry = file.experiments[name]
        start, teacher = pretraining[entry.pretraining], entry.training.teacher
        resolved = {
            "data": data,
            "model": start.model.model_dump(),
            "pretraining": {"method": start.method, **start.training.model_dump()} if start.training.epochs else {"epochs": 0},
            "method": entry.method,
            "training": entry.training.model_dump(),
            "evaluation": evaluation,
        }
        if teacher and teacher.experiment:
            resolved["teacher"] = {key: value for key, value in experiment(teacher.experiment).resolved.items() if key in OF_TRAINING}
        own, attack = raw["experiments"][name].get("training", {}), file.evaluation.attack.on(entry.base)
        names = (entry.method, entry.base, entry.form, entry.pretraining, entry.note, entry.control)
        return Experiment(*names, own, start.model, entry.training, attack, resolved)

    return Profile(
        data=file.data,
        model=file.model,
        training=file.training,
        pretraining=pretraining,
        experiments={name: experiment(name) for name in file.experiments},
        seeds=file.seeds,
        evaluation=file.evaluation,
        runtime=file.runtime,
        report=file.report,
    )


def base_of(method: str, base: str | None) -> str | None:
    """The base of a method: the given one, or the method's first, if it has any."""
    return base or next(iter(registry.METHODS[method].bases), None)


def form_of(method: str, form: str | None) -> str | None:
    """The form of a method: the given one, or the method's first, if it has any."""
    return form or next(iter(registry.METHODS[method].forms), None)


def form_values(form: str, base: str | None) -> dict[str, Any]:
    """Settings of a form on a base."""
    preset = registry.FORMS[form]
    return merge(preset.defaults, preset.on.get(base or "", {}))


def presets(method: str, base: str | None, form: str | None, on_base: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What lies between a profile's `training` and an experiment's own settings, weakest first.

    The base's published preset, the profile's values for that base (on_base), the method's defaults, the form.
    """
    return [
        *([registry.BASES[base].defaults, on_base] if base else []),
        registry.METHODS[method].defaults,
        *([form_values(form, base)] if form else []),
    ]
