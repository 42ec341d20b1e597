"""Everything that is wrong with a profile's settings, as (key path, what is wrong and what is allowed)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ebjdat import registry
from ebjdat.settings.evaluation import Evaluation, ReferenceSettings
from ebjdat.settings.profile import ProfileFile
from ebjdat.settings.training import BudgetSettings, ChainSettings, ExampleWeights, UpdateSettings
from ebjdat.settings.types import mapping, merge, nearest, one_or_more, section, shown

Where = tuple[str | int, ...]
Problem = tuple[Where, str]
Layers = Sequence[tuple[str, Mapping[str, Any]]]  # (a file's name, or an override, its raw settings), weakest first

# Sections whose settings a strategy reads: section -> (the key that names it, the strategies, the strategy by default). No schedule: a
# trial run's override replaces every experiment's.
CHOSEN: Mapping[str, tuple[str, Mapping[str, registry.Entry], str]] = {
    "training.chain": ("training.chain.sampler", registry.SAMPLERS, ChainSettings().sampler),
    "training.update": ("training.update.name", registry.UPDATES, UpdateSettings().name),
    "training.adversary.budget": ("training.adversary.budget.name", registry.BUDGETS, BudgetSettings().name),
    "training.weights.examples": ("training.weights.examples.name", registry.WEIGHTINGS, ExampleWeights().name),
    "training.weights": ("method", registry.METHODS, "classifier"),
}
# Sections that only methods read which sample this.
SAMPLED: Mapping[str, str] = {"training.contrast": "contrast", "training.policy": "policy"}
# Chain settings that some samplers ignore.
READ_BY_SAMPLERS = frozenset(key for sampler in registry.SAMPLERS.values() for key in sampler.reads)
# Keys of the profile's training.chain that no training would use: every base sets them, or has a sampler that ignores them.
NEVER_USED = frozenset(
    key
    for key in ("sampler", "start", "mode", *READ_BY_SAMPLERS)
    if all(
        key in base.defaults["chain"] or (key in READ_BY_SAMPLERS and key not in registry.SAMPLERS[base.defaults["chain"]["sampler"]].reads)
        for base in registry.BASES.values()
    )
)


def of_profile(
    raw: Mapping[str, Any], whole: Mapping[str, Any], error: ValidationError | None, evaluation: Evaluation | None
) -> Iterator[Problem]:
    """What validation refused, and what only several sections together can show.

    raw: before inheritance. whole: after it. evaluation: where that section is valid.
    """
    if error:
        yield from _stated_in(raw, of_validation(ProfileFile, error))
    yield from _unread(raw, whole)
    yield from _pretrainings(raw)
    yield from _frozen(whole)
    yield from _controls(raw, whole)
    yield from _teachers(raw, whole)
    if evaluation:
        if evaluation.attack.transfer is not None:
            yield from _missing_run(raw, ("evaluation", "attack", "transfer"), evaluation.attack.transfer)
        yield from _missing_run(raw, ("evaluation", "generate", "reference"), evaluation.generate.reference)  # read with any extractor
        if evaluation.teacher is not None:
            yield from _missing_experiment(raw, ("evaluation", "teacher", "recipe"), evaluation.teacher.recipe)


def of_validation(model: type[BaseModel], error: ValidationError) -> Iterator[Problem]:
    """pydantic's errors in words that suit YAML."""
    for one in error.errors(include_url=False):
        where = tuple(part for part in one["loc"] if part != "[key]")
        if one["type"] == "extra_forbidden":
            yield where, f"unknown key; {nearest(str(where[-1]), _fields_at(model, where[:-1]))}"
        elif one["type"] == "missing":
            yield where, "is missing"
        elif one["type"] == "value_error":
            yield where, str(one["ctx"]["error"])
        elif one["type"] != "too_short" or not one["input"]:  # pydantic counts valid items only; each invalid one is reported itself
            message = re.sub(" or instance of \\w+", "", one["msg"]).replace("tuple", "list").replace("dictionary", "mapping")
            yield where, f"{message[0].lower()}{message[1:]}, found {shown(one['input'])}"


def _stated_in(raw: Mapping[str, Any], problems: Iterable[Problem]) -> Iterator[Problem]:
    """Problems, without those that an experiment, pretraining or base only inherits from a place where they are reported too."""
    problems = list(problems)
    reported = {where for where, _ in problems}
    for where, what in problems:
        sources: list[Where] = []
        if where[0] == "bases" and len(where) > 1:
            sources = [("training", *where[2:])]
        elif where[0] in ("pretraining", "experiments") and len(where) > 2 and where[2] in ("training", "model"):
            sources = [where[2:], *(("bases", base, *where[3:]) for base in registry.BASES), (*where[:2], *where[3:])]
        own = _stated(raw, where)
        same = isinstance(own, Mapping) and any((source, what) in problems for source in sources)
        if not same and (own is not None or not any(_covers(reported, source, where) for source in sources)):
            yield where, what


def _covers(reported: Set[Where], source: Where, where: Where) -> bool:
    """Whether a problem is reported at `source` or above it (but not above `where`)."""
    return any(source[:n] in reported for n in range(1, len(source) + 1) if source[:n] != where[:n])


def _stated(raw: Any, where: Where) -> Any:
    """What raw settings state at `where`, or the list or plain value above it; None if nothing."""
    for part in where:
        if not isinstance(raw, Mapping):
            break
        if part not in raw:
            return None
        raw = raw[part]
    return ... if raw is None else raw


def without_effect(layers: Layers) -> Iterator[Problem]:
    """Empty mappings laid over settings, which could mean "change nothing" or "remove everything"."""

    def inside(below: Mapping[str, Any], over: Mapping[str, Any], where: Where) -> Iterator[Problem]:
        if below and not over:
            yield where, "an empty mapping over settings neither changes nor removes any; leave it out, or name what is to change"
        for key in over.keys() & below.keys():
            if isinstance(over[key], Mapping) and isinstance(below[key], Mapping):
                yield from inside(below[key], over[key], (*where, key))

    below: Mapping[str, Any] = {}
    for _, content in layers:
        yield from inside(below, content, ())
        below = merge(below, content)


def _entries(raw: Mapping[str, Any], kind: str) -> dict[str, Mapping[str, Any]]:
    return {name: entry for name, entry in mapping(raw.get(kind)).items() if isinstance(entry, Mapping)}


# Samples that the adversary's budget limits.
LIMITED = frozenset({"adversarial", "corner", "policy", "uniform"})
# Settings of the adversary that the policy chooses instead.
CHOSEN_BY_POLICY = frozenset({"steps", "step_ratio"})


def _unread(raw: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that the strategy of their section does not read, and chain settings that nothing does."""
    for kind in ("pretraining", "experiments"):
        for name, entry in _entries(raw, kind).items():
            for part, (key, strategies, default) in CHOSEN.items():
                chosen = str(section(whole[kind][name], key) or default)
                if chosen in strategies:
                    reads, known = strategies[chosen].reads, {read for row in strategies.values() for read in row.reads}
                    for unread in sorted(known & set(mapping(section(entry, part))) - set(reads)):
                        by = f"{key.removesuffix('.name').rpartition('.')[2]} {chosen!r}"
                        yield (kind, name, *part.split("."), unread), f"is not read by {by}; it reads {', '.join(reads) or 'none'}"
            method = str(whole[kind][name].get("method") or "classifier")
            for part, sample in SAMPLED.items():
                readers = [other for other, row in registry.METHODS.items() if sample in row.samples]
                if method in registry.METHODS and method not in readers and mapping(section(entry, part)):
                    yield (kind, name, *part.split(".")), f"is not read by method {method!r}, only by {', '.join(readers)}"
            if method in registry.METHODS and "policy" in registry.METHODS[method].samples:
                for key in sorted(CHOSEN_BY_POLICY & set(mapping(section(entry, "training.adversary")))):
                    what = f"is not read by method {method!r}, whose policy chooses it; set training.policy"
                    yield (kind, name, "training", "adversary", key), what
            if section(entry, "training.adversary.budget") and not LIMITED & {*getattr(registry.METHODS.get(method), "samples", LIMITED)}:
                yield (kind, name, "training", "adversary", "budget"), f"is not read by method {method!r}, which moves no images"
            watched, method = mapping(section(entry, "training.healing")).get("overfitting"), whole[kind][name].get("method", "classifier")
            if watched is not None and method in registry.METHODS and "adversarial" not in registry.METHODS[method].samples:
                what = f"is not read by method {method!r}, which does not train on adversarial images"
                yield (kind, name, "training", "healing", "overfitting"), what
    for key in sorted(NEVER_USED & set(mapping(section(raw, "training.chain")))):
        yield ("training", "chain", key), f"is never used, since every base sets it; set bases.<base>.chain.{key}"


def _pretrainings(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """References to a pretraining that does not exist, and pretrainings that are the same."""
    pretrainings = _entries(raw, "pretraining")
    for name, entry in _entries(raw, "experiments").items():
        start = entry.get("pretraining")
        if isinstance(start, str) and start not in pretrainings:
            yield ("experiments", name, "pretraining"), f"{start!r} is not under `pretraining`; {nearest(start, list(pretrainings))}"
    first: dict[str, str] = {}
    for name, entry in pretrainings.items():
        if "epochs" in mapping(entry.get("training")):
            yield ("pretraining", name, "training", "epochs"), f"is one level too deep; set pretraining.{name}.epochs"
        content = {"method": "classifier", "training": {}, **entry} if entry.get("epochs") != 0 else {"epochs": 0}
        content = {**content, "model": sorted(merge(mapping(raw.get("model")), mapping(entry.get("model"))).items())}
        twin = first.setdefault(repr(sorted(content.items())), name)
        if twin != name:
            yield ("pretraining", name), f"the same settings as pretraining.{twin}; use that one, so that they share a checkpoint"


def _frozen(whole: Mapping[str, Any]) -> Iterator[Problem]:
    """Trainings that keep running statistics which no training made."""
    for kind in ("pretraining", "experiments"):
        for name, entry in _entries(whole, kind).items():
            start = _entries(whole, "pretraining").get(str(entry.get("pretraining")), {})
            if section(entry, "training.mode") == "eval" and (start.get("epochs") == 0 or (kind == "pretraining" and entry.get("epochs"))):
                what = "'eval' keeps batch norm's running statistics, and a network that was not trained has none"
                yield (kind, name, "training", "mode"), f"{what}; start from a pretraining with epochs"


def _controls(raw: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[Problem]:
    """Controls that are no other experiment of the profile, or train as the experiment itself does."""
    entries = _entries(raw, "experiments")
    for name, entry in entries.items():
        others, where = [other for other in entries if other != name], ("experiments", name, "control")
        named = one_or_more(entry.get("control"))
        controls = [control for control in named if isinstance(control, str)] if isinstance(named, list | tuple) else []
        for control in controls:
            if control not in others:
                yield where, f"{control!r} is not another experiment; {nearest(control, others)}"
            elif _trained(whole, name) == _trained(whole, control):
                yield where, f"{control!r} trains with the same settings; a control differs in what matters"
        if len(set(controls)) < len(controls):
            yield where, "duplicate control; name each once"


def _teachers(raw: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[Problem]:
    """Teachers that are no other experiment of the profile, or learn from their own students."""

    def teacher_of(name: str) -> Any:
        return section(whole["experiments"][name], "training.teacher.experiment")

    for name in _entries(raw, "pretraining"):
        if section(whole["pretraining"][name], "training.teacher"):
            yield ("pretraining", name, "training", "teacher"), "a pretraining has no teacher; distil in an experiment"
    entries = _entries(raw, "experiments")
    for name in entries:
        where, line = ("experiments", name, "training", "teacher"), [name]
        teacher = teacher_of(name)
        if not isinstance(teacher, str):
            continue
        others = [other for other in entries if other != name]
        if teacher not in others:
            yield (*where, "experiment"), f"{teacher!r} is not another experiment; {nearest(teacher, others)}"
        while isinstance(teacher, str) and teacher in entries and teacher not in line:
            line.append(teacher)
            teacher = teacher_of(teacher)
        if teacher == name and len(line) > 1:
            yield (*where, "experiment"), f"experiments teach each other in a circle: {', '.join(line)}"
        seed, seeds = section(whole["experiments"][name], "training.teacher.seed"), raw.get("seeds")
        if seed is not None and isinstance(seeds, list) and seed not in seeds:
            yield (*where, "seed"), f"{shown(seed)} is not one of the profile's seeds {shown(seeds)}"


def _trained(whole: Mapping[str, Any], experiment: str) -> dict[str, Any]:
    """What an experiment's training is made from."""
    return {key: value for key, value in whole["experiments"][experiment].items() if key not in ("note", "control")}


def _missing_run(raw: Mapping[str, Any], where: Where, reference: ReferenceSettings) -> Iterator[Problem]:
    seeds = raw.get("seeds")
    yield from _missing_experiment(raw, (*where, "experiment"), reference.experiment)
    if isinstance(seeds, list) and reference.seed not in seeds:
        yield (*where, "seed"), f"{reference.seed} is not one of the profile's seeds {shown(seeds)}"


def _missing_experiment(raw: Mapping[str, Any], where: Where, name: str) -> Iterator[Problem]:
    experiments = list(_entries(raw, "experiments"))
    if name not in experiments:
        yield where, f"{name!r} is not an experiment of this profile; {nearest(name, experiments)}"


def _fields_at(model: type[BaseModel], where: Where) -> list[str]:
    """Field names of the settings class at `where` below `model`."""
    for part in where:
        field = model.model_fields.get(str(part))
        if field is None:  # a name in a mapping such as `experiments`: stay at the class of its values
            continue
        for candidate in (field.annotation, *_all_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return list(model.model_fields)


def _all_args(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _all_args(argument)


def origin(layers: Layers, where: Where) -> str:
    """The last layer that states the setting at `where`; if none does, the first that states most of the path to it."""
    origin, deepest = layers[0][0], 0
    for name, content in layers:
        value: Any = content
        for depth, part in enumerate(where):
            if not isinstance(value, Mapping):  # a list or plain value, which holds everything below it
                depth = len(where)
                break
            if part not in value:
                break
            value = value[part]
        else:
            depth = len(where)
        if depth > deepest or depth == len(where):
            origin, deepest = name, depth
    return origin


def key_path(where: Where) -> str:
    """a.b.0, with non-ASCII letters (some only look like those of a key) escaped."""
    return ascii(".".join(map(str, where)))[1:-1] or "top level"
