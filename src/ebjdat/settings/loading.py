"""A profile's file and its overrides, read, checked and named."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from ebjdat import registry, yamlfile
from ebjdat.errors import brief
from ebjdat.files import digest
from ebjdat.settings.data import DataSettings
from ebjdat.settings.evaluation import STANDARD, AttackSettings, Evaluation, ReferenceSettings
from ebjdat.settings.profile import NEVER_USED, READ_BY_SAMPLERS, ROWS, Profile, training_layers
from ebjdat.settings.training import ChainSettings, ModelSettings, TrainingSettings
from ebjdat.settings.types import MOST_PROBLEMS, ParamsError, mapping, merge, nearest, shown

RUN_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
LONGEST_RUN = 150  # characters of a run's name: the profile's, and that of every override
RESERVED = "pretraining"  # the folder of shared pretrainings beside those of experiments


def usual_protocols(n: int, overrides: Sequence[str] = ()) -> AttackSettings:
    """The field's protocols for natural images (L-infinity 8/255, L2 0.5) and the released one, for networks without a profile.

    n: images that each ensemble meets. overrides: YAML files or key.path=value of an AttackSettings.
    """
    raw: dict[str, Any] = {
        "protocols": {
            STANDARD: {"eps": "8/255", "pgd": {"step_size": "2/255"}, "n": n},
            "released": {"eps": "8/255", "pgd": {"step_size": "1/255"}, "n": n},
            "standard_l2": {"like": STANDARD, "norm": "L2", "eps": 0.5, "pgd": {"step_size": 0.1}, "n": n},
        }
    }
    raw = merge(raw, *(content for _, content in read_layers(None, overrides)))
    problems = [f"{_key_path(where)}: {what}" for where, what in _invalid(AttackSettings, raw, ())]
    if problems:
        raise ParamsError("\n".join(problems))
    return AttackSettings.model_validate(raw)


def split_overrides(text: str) -> list[str]:
    """Overrides that stand in one text (make's OVERRIDES, Snakemake's `overrides=`), as a shell would part them.

    A value with spaces is quoted: "data.path='my images.tar.xz' params/overrides/ci.yaml".
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ParamsError(f"overrides {text!r}: {error}; words are quoted as in a shell: data.path='my images.tar.xz'") from None
    for word in words:
        if "=" not in word and Path(word).suffix not in (".yaml", ".yml"):
            raise ParamsError(
                f"overrides {text!r}: {word!r} is neither key.path=value nor a YAML file; "
                "a value with spaces is quoted: data.path='my images.tar.xz'"
            )
    return words


def join_overrides(overrides: Sequence[str]) -> str:
    """What Snakemake's `overrides=` takes for these: the words, or a list where one of them would have to be quoted."""
    text = " ".join(overrides)
    return text if text == shlex.join(overrides) else json.dumps(list(overrides), ensure_ascii=False)


def read_layers(path: Path | str | None, overrides: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The profile, where there is one, and its overrides (a YAML file, or "key.path=value") as (where it is from, raw mapping)."""
    layers, profile = [], [] if path is None else [path]
    for i, item in enumerate(map(str, [*profile, *overrides])):
        name = f"override {shown(item)}" if "=" in item else item if item.isprintable() and 0 < len(item) < 1000 else shown(item)
        try:
            content = yamlfile.parse_assignment(item) if "=" in item else yamlfile.parse(yamlfile.read_text(Path(item)))
        except FileNotFoundError as error:
            beside = sorted(p.stem for p in Path(item).parent.glob("*.yaml") if p.stem.isprintable())
            near = f"; {nearest(Path(item).stem, beside)}" if beside else ""
            if i >= len(profile) and Path(item).suffix not in (".yaml", ".yml"):
                near = "; key.path=value or a YAML file is allowed"
            raise ParamsError(f"{name}: there is no such file{near}") from error
        except yamlfile.YamlError as error:
            raise ParamsError(f"{name}: {error}") from error
        if not isinstance(content, dict):
            found = "nothing" if content is None else type(content).__name__
            raise ParamsError(f"{name}: a mapping of settings is allowed, found {found}")
        layers.append((name, content))
    return layers


def load(path: Path | str, overrides: Sequence[str] = ()) -> Profile:
    """Read and check a profile with its overrides. Raises ParamsError that lists every problem."""
    layers = read_layers(path, overrides)
    run_name(path, overrides)  # (what is wrong with it)
    raw = merge({}, *(content for _, content in layers))
    problems = list(dict.fromkeys(chain(_without_effect(layers), _problems(raw))))
    if problems:
        lines = [f"{_origin(layers, where)}: {_key_path(where)}: {what}" for where, what in problems[:MOST_PROBLEMS]]
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ParamsError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the settings:\n  " + "\n  ".join(lines + more))
    return Profile.model_validate(raw)


def _key_path(where: Sequence[str | int]) -> str:
    """a.b.0, escaped where letters only look like those of a key."""
    return ascii(".".join(map(str, where)))[1:-1] or "top level"


def _without_effect(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Problem]:
    """Empty mappings laid over settings: "change nothing" as likely as "replace by nothing"."""

    def inside(below: Mapping[str, Any], over: Mapping[str, Any], where: tuple[str | int, ...]) -> Iterator[Problem]:
        if below and not over:
            yield where, "an empty mapping over settings neither changes nor removes any; leave it out, or name what is to change"
        for key in over.keys() & below.keys():
            if isinstance(over[key], Mapping) and isinstance(below[key], Mapping):
                yield from inside(below[key], over[key], (*where, key))

    below: Mapping[str, Any] = {}
    for _, content in layers:
        yield from inside(below, content, ())
        below = merge(below, content)


Problem = tuple[tuple[str | int, ...], str]


def _problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Every problem of the raw settings: each section by itself first, then what sections say of each other."""
    yield from _invalid(Profile, raw, ())
    sections = {name: _section(name, raw) for name in ("data", "evaluation")}
    training = raw.get("training")
    if isinstance(training, Mapping) and not list(_invalid(TrainingSettings, training, ())):
        yield from _training_problems(raw, training, cast(DataSettings | None, sections["data"]))
    yield from _reference_problems(raw)
    data, evaluation = cast(DataSettings | None, sections["data"]), cast(Evaluation | None, sections["evaluation"])
    if data and evaluation:
        yield from _evaluation_problems(raw, data, evaluation)


def _section(name: str, raw: Mapping[str, Any]) -> BaseModel | None:
    model = cast(type[BaseModel], Profile.model_fields[name].annotation)
    try:
        return model.model_validate(raw.get(name))
    except ValidationError:
        return None


def _entries(raw: Mapping[str, Any], section: str) -> dict[str, Mapping[str, Any]]:
    entries = raw.get(section)
    return {k: v for k, v in entries.items() if isinstance(v, Mapping)} if isinstance(entries, Mapping) else {}


def _training_problems(raw: Mapping[str, Any], training: Mapping[str, Any], data: DataSettings | None) -> Iterator[Problem]:
    """Problems of each training after its overrides, and of its size against the data."""
    size = data.training_size() if data else None
    bases = _entries(raw, "bases")
    trainings: list[tuple[tuple[str | int, ...], Mapping[str, Any]]] = [(("training",), training)]
    for base, values in bases.items():
        if base in registry.BASES:
            trainings.append((("bases", base), merge(training, registry.BASES[base].defaults, values)))
    for kind in ("pretraining", "experiments"):
        for name, entry in _entries(raw, kind).items():
            override = entry.get("training", {})
            method = str(entry.get("method", "classifier"))
            if not isinstance(override, Mapping) or method not in registry.METHODS:
                continue
            row, form = (str(entry.get(key)) if str(entry.get(key)) in rows else None for key, rows in ROWS.items())
            own = {"epochs": entry["epochs"]} if kind == "pretraining" and isinstance(entry.get("epochs"), int) else {}
            merged = merge(*training_layers(training, bases, method, row, form, override), own)
            trainings.append(((kind, name, "training"), merged))
            sampler = str(mapping(merged.get("chain")).get("sampler", ChainSettings().sampler))
            reads = registry.SAMPLERS[sampler].reads if sampler in registry.SAMPLERS else tuple(READ_BY_SAMPLERS)
            for key in sorted(READ_BY_SAMPLERS & set(mapping(override.get("chain"))) - set(reads)):
                yield (kind, name, "training", "chain", key), f"is not read by sampler {sampler!r}; it reads {', '.join(reads)}"
    mirrored = f"mirrored images of {data.source!r} are of another class or of none; allowed: false" if data else ""
    for where, settings in trainings:
        found = list(_invalid(TrainingSettings, settings, where))
        yield from found
        if data and not data.record.flip and mapping(settings.get("augment")).get("flip") is True:
            yield (*where, "augment", "flip"), mirrored
        for key in ("batch_size", "density_batch_size"):
            batch = settings.get(key)
            if not found and size is not None and isinstance(batch, int) and batch > size:
                yield (*where, key), f"{batch} is larger than the training split ({size} images); allowed: 1 to {size}"
    for key in sorted(NEVER_USED & set(mapping(training.get("chain")))):
        yield ("training", "chain", key), f"is never used, since every row of the JEM family sets it; set bases.<base>.chain.{key}"


def _reference_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    pretrainings = _entries(raw, "pretraining")
    for name, entry in _entries(raw, "experiments").items():
        if name == RESERVED:
            yield ("experiments", name), "this name is kept for the shared pretrainings' folder; use another"
        wanted = entry.get("pretraining")
        if isinstance(wanted, str) and wanted not in pretrainings:
            yield ("experiments", name, "pretraining"), f"{wanted!r} is not under `pretraining`; {nearest(wanted, list(pretrainings))}"
    first: dict[str, str] = {}
    for name, entry in pretrainings.items():
        if isinstance(entry.get("training"), Mapping) and "epochs" in entry["training"]:
            yield ("pretraining", name, "training", "epochs"), f"stands one level too deep; set pretraining.{name}.epochs"
        network = merge(mapping(raw.get("model")), mapping(entry.get("model")))
        yield from _invalid(ModelSettings, network, ("pretraining", name, "model"))
        content = {"method": "classifier", "training": {}, **entry} if entry.get("epochs") != 0 else {"epochs": 0}
        content = {**content, "model": sorted(network.items())}
        twin = first.setdefault(repr(sorted(content.items())), name)
        if twin != name:
            yield ("pretraining", name), f"the same settings as pretraining.{twin}; name that one, so that its checkpoint is shared"
    seeds = raw.get("seeds")
    numbers = [seed for seed in seeds if isinstance(seed, int | float)] if isinstance(seeds, list) else []
    if len(set(numbers)) < len(numbers):  # 0 and 0.0 are one
        yield ("seeds",), "each seed may stand once"


def _evaluation_problems(raw: Mapping[str, Any], data: DataSettings, evaluation: Evaluation) -> Iterator[Problem]:
    test = data.test_size()
    for name, protocol in evaluation.attack.protocols.items():
        if test and protocol.n > test:
            yield ("evaluation", "attack", "protocols", name, "n"), f"{protocol.n} is more than the test split has; allowed: 0 to {test}"
    if evaluation.energy.n and test and evaluation.energy.n > test:
        yield ("evaluation", "energy", "n"), f"{evaluation.energy.n} is more than the test split has; allowed: 1 to {test}"
    if evaluation.attack.transfer is not None:
        yield from _no_such_run(raw, ("evaluation", "attack", "transfer"), evaluation.attack.transfer)
    generate = evaluation.generate
    if generate.extractor == "inception" and data.record.shape and data.record.shape[0] == 1:
        what = f"Inception is for natural images in colour; allowed for {data.source!r}: reference"
        yield ("evaluation", "generate", "extractor"), what
    if generate.extractor != "inception":
        yield from _no_such_run(raw, ("evaluation", "generate", "reference"), generate.reference)
    reliability = evaluation.reliability
    if reliability.n and test and reliability.n > test:
        yield ("evaluation", "reliability", "n"), f"{reliability.n} is more than the test split has; allowed: 2 to {test}"
    if "path" not in data.record.reads and data.source in reliability.ood:
        yield ("evaluation", "reliability", "ood"), f"{data.source!r} is what the networks are trained on; name another set"
    if data.path and reliability.ood_path == data.path:
        yield ("evaluation", "reliability", "ood_path"), "is data.path, what the networks are trained on; name another set"


def _no_such_run(raw: Mapping[str, Any], where: tuple[str, ...], wanted: ReferenceSettings) -> Iterator[Problem]:
    experiments = list(_entries(raw, "experiments"))
    if wanted.experiment not in experiments:
        yield (
            (*where, "experiment"),
            f"{wanted.experiment!r} is not an experiment of this profile; {nearest(wanted.experiment, experiments)}",
        )
    if isinstance(raw.get("seeds"), list) and wanted.seed not in raw["seeds"]:
        yield (*where, "seed"), f"{wanted.seed} is not one of the profile's seeds {shown(raw['seeds'])}"


def _invalid(model: type[BaseModel], raw: Any, prefix: tuple[str | int, ...]) -> Iterator[Problem]:
    try:
        model.model_validate(raw)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            where = tuple(part for part in one["loc"] if part != "[key]")
            if one["type"] == "extra_forbidden":
                what = f"unknown key; {nearest(str(where[-1]), _fields_at(model, where[:-1]))}"
            elif one["type"] == "too_short" and one["input"]:
                continue  # pydantic counts the valid ones alone; each of the others is a problem of its own
            elif one["type"] == "missing":
                what = "is missing"
            elif one["type"] == "value_error":
                what = str(one["ctx"]["error"])
            else:
                msg = re.sub(" or instance of \\w+", "", one["msg"]).replace("tuple", "list").replace("dictionary", "mapping")
                what = f"{msg[0].lower()}{msg[1:]}, found {shown(one['input'])}"
            yield (*prefix, *where), what


def _fields_at(model: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """Field names of the settings class that lies at `where` below `model`."""
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


def _origin(layers: Sequence[tuple[str, Mapping[str, Any]]], where: Sequence[str | int]) -> str:
    """The last layer that says something at `where`, else the first of those that say most of what is above it."""
    told, deepest = layers[0][0], 0
    for name, content in layers:
        value: Any = content
        for depth, part in enumerate(where):
            if not isinstance(value, Mapping):  # a list or plain value of this layer, which stands for all below it
                depth = len(where)
                break
            if part not in value:
                break
            value = value[part]
        else:
            depth = len(where)
        if depth > deepest or depth == len(where):
            told, deepest = name, depth
    return told


def run_name(path: Path | str, overrides: Sequence[str] = ()) -> str:
    """Name of results, checkpoints and MLflow experiment: the profile's, plus what it is overridden by.

    An overridden run so never mixes with the profile's own: "digits+ci", or "digits+1a2b3c" for key=value overrides.
    Raises ParamsError for a file whose name cannot be part of folders and file patterns.
    """
    files = [Path(item).stem for item in overrides if "=" not in item]
    for stem in (Path(path).stem, *files):
        if not RUN_PATTERN.fullmatch(stem):
            raise ParamsError(
                f"a file's name becomes part of folders' names, so letters, digits, ., - and _ are allowed, up to 100; found {shown(stem)}"
            )
    values = [item for item in overrides if "=" in item]
    name = "+".join([Path(path).stem, *files, *([digest(values)[:6]] if values else [])])
    if len(name) > LONGEST_RUN:
        told = f"{brief(name, 60)}, {len(name)} characters; allowed are {LONGEST_RUN}"
        raise ParamsError(f"{path}: with its overrides the run is named {told}; shorten the files' names")
    return name


@dataclass(frozen=True)
class Named:
    """A file or folder that settings name. lost: without it the run ends only after trainings."""

    key: str
    path: str
    here: bool
    lost: bool
    otherwise: str  # what happens, or is to be done, where it is not there

    def __str__(self) -> str:
        return f"{self.key}: {self.path} " + ("is here" if self.here else self.otherwise)


def _named(key: str, path: str | Path, lost: bool, otherwise: str) -> Named:
    try:
        return Named(key, str(path), Path(path).exists(), lost, otherwise)
    except OSError as error:  # no file can have this path
        return Named(key, brief(path), False, True, f"cannot be had: {error.strerror}")


def named_files(profile: Profile) -> Iterator[Named]:
    """The files and folders outside of `results` that a profile reads, and whether they are there."""
    data, reliability, generate = profile.data, profile.evaluation.reliability, profile.evaluation.generate
    if "path" in data.record.reads and data.path:
        yield _named("data.path", data.path, False, "is not here yet; put the folder or archive there")
    for key, source in [("data.root", data.source), *(("evaluation.reliability.ood", name) for name in reliability.ood)]:
        if source in registry.SOURCES and (file := registry.SOURCES[source].downloads):
            fetched = f"is not here yet; {source} is fetched to data.root when it is read"
            yield _named(key, Path(data.root, file), False, fetched)
    if path := reliability.ood_path:
        yield _named("evaluation.reliability.ood_path", path, True, "is not here; put the folder or archive there")
    if (path := generate.inception_weights) and generate.extractor != "reference":
        named = _named("evaluation.generate.inception_weights", path, True, "is not here; put the file of Inception's weights there")
        yield replace(named, here=named.here and Path(path).is_file())


def lost_files(profile: Profile) -> list[str]:
    """Named files, a line each, whose absence would be noticed only after trainings."""
    return [str(named) for named in named_files(profile) if named.lost and not named.here]


def require_files(profile: Profile) -> None:
    """Raises ParamsError for lost_files."""
    if lost := lost_files(profile):
        raise ParamsError("\n".join(lost))
