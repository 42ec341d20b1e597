"""A profile's file and its overrides: read, merged, checked, named."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebjdat import registry, yamlfile
from ebjdat.errors import brief
from ebjdat.files import digest
from ebjdat.names import STANDARD
from ebjdat.settings import problems
from ebjdat.settings.evaluation import AttackSettings
from ebjdat.settings.profile import Profile, ProfileFile, inherited, resolve
from ebjdat.settings.types import MOST_LISTED, ParamsError, merge, nearest, shown

RUN_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
LONGEST_RUN = 150  # characters of a run's name: the profile's and every override's


def split_overrides(text: str) -> list[str]:
    """Split a text of overrides (make's OVERRIDES, Snakemake's `overrides=`) as a shell would. Raises ParamsError.

    Values with spaces are quoted: "data.path='my images.tar.xz' params/overrides/ci.yaml".
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ParamsError(f"overrides {text!r}: {error}; quote words as in a shell: data.path='my images.tar.xz'") from None
    for word in words:
        if "=" not in word and Path(word).suffix not in (".yaml", ".yml"):
            raise ParamsError(
                f"overrides {text!r}: {word!r} is neither key.path=value nor a YAML file; "
                "quote a value with spaces: data.path='my images.tar.xz'"
            )
    return words


def join_overrides(overrides: Sequence[str]) -> str:
    """Overrides as Snakemake's `overrides=` takes them: plain words, or a JSON list where one of them needs quotes."""
    text = " ".join(overrides)
    return text if text == shlex.join(overrides) else json.dumps(list(overrides), ensure_ascii=False)


def read_layers(path: Path | str | None, overrides: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """A profile, if any, and its overrides (YAML files or "key.path=value") as (name in messages, raw mapping). Raises ParamsError."""
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
    run_name(path, overrides)  # refuses unusable names
    raw = merge({}, *(content for _, content in layers))
    whole = inherited(raw)
    file, error = None, None
    valid: dict[str, Any] = {}
    try:
        file = ProfileFile.model_validate(whole, context=valid)
    except ValidationError as invalid:
        error = invalid
    wrong = list(dict.fromkeys(chain(problems.without_effect(layers), problems.of_profile(raw, whole, error, valid.get("evaluation")))))
    if wrong or file is None:
        lines = [f"{problems.origin(layers, where)}: {problems.key_path(where)}: {what}" for where, what in wrong[:MOST_LISTED]]
        more = [f"and {len(wrong) - MOST_LISTED} more"] if len(wrong) > MOST_LISTED else []
        raise ParamsError(f"{len(wrong)} problem{'s' if len(wrong) > 1 else ''} in the settings:\n  " + "\n  ".join(lines + more))
    return resolve(file, raw)


def usual_protocols(n: int, overrides: Sequence[str] = ()) -> AttackSettings:
    """The common protocols for natural images (L-infinity 8/255, L2 0.5) and the released one, for networks without a profile.

    n: images that each ensemble attacks. overrides: YAML files or key.path=value of an AttackSettings. Raises ParamsError.
    """
    raw: dict[str, Any] = {
        "protocols": {
            STANDARD: {"eps": "8/255", "pgd": {"step_size": "2/255"}, "n": n},
            "released": {"eps": "8/255", "pgd": {"step_size": "1/255"}, "n": n},
            "standard_l2": {"like": STANDARD, "norm": "L2", "eps": 0.5, "pgd": {"step_size": 0.1}, "n": n},
        }
    }
    try:
        return AttackSettings.model_validate(merge(raw, *(content for _, content in read_layers(None, overrides))))
    except ValidationError as error:
        wrong = problems.of_validation(AttackSettings, error)
        raise ParamsError("\n".join(f"{problems.key_path(where)}: {what}" for where, what in wrong)) from None


def run_name(path: Path | str, overrides: Sequence[str] = ()) -> str:
    """Name of results, checkpoints and MLflow experiment: the profile's, and its overrides.

    So the results of overridden runs stay apart: "digits+ci", or "digits+1a2b3c" for key=value overrides.
    Raises ParamsError for a file name that is unusable in folder names and file patterns.
    """
    files = [Path(item).stem for item in overrides if "=" not in item]
    for stem in (Path(path).stem, *files):
        if not RUN_PATTERN.fullmatch(stem):
            raise ParamsError(
                f"file names become part of folder names: up to 100 letters, digits, ., - and _ are allowed, found {shown(stem)}"
            )
    values = [item for item in overrides if "=" in item]
    name = "+".join([Path(path).stem, *files, *([digest(values)[:6]] if values else [])])
    if len(name) > LONGEST_RUN:
        long = f"{brief(name, 60)} has {len(name)} characters, {LONGEST_RUN} are allowed"
        raise ParamsError(f"{path}: the run's name {long}; shorten the file names")
    return name


@dataclass(frozen=True)
class Named:
    """A file or folder that settings name. needed: if it is missing, the run would fail only after trainings."""

    key: str
    path: str
    exists: bool
    needed: bool
    otherwise: str  # what happens, or what to do, if it is missing

    def __str__(self) -> str:
        return f"{self.key}: {self.path} " + ("is here" if self.exists else self.otherwise)


def _named(key: str, path: str | Path, needed: bool, otherwise: str) -> Named:
    try:
        return Named(key, str(path), Path(path).exists(), needed, otherwise)
    except OSError as error:  # no file can have this path
        return Named(key, brief(path), False, True, f"is unavailable: {error.strerror}")


def named_files(profile: Profile) -> Iterator[Named]:
    """The files and folders outside of `results` that a profile reads, and whether they exist."""
    data, reliability, generate = profile.data, profile.evaluation.reliability, profile.evaluation.generate
    if "path" in data.record.reads and data.path:
        yield _named("data.path", data.path, False, "is not here yet; put the folder or archive there")
    if data.extra:
        yield _named("data.extra", data.extra, False, "is not here yet; put the .npz, folder or archive there")
    for key, source in [("data.root", data.source), *(("evaluation.reliability.ood", name) for name in reliability.ood)]:
        if source in registry.SOURCES and (file := registry.SOURCES[source].downloads):
            fetched = f"is not here yet; {source} is downloaded to data.root when it is read"
            yield _named(key, Path(data.root, file), False, fetched)
    teachers = {name: entry.training.teacher for name, entry in profile.experiments.items()}
    for name, weights in [(name, teacher.weights) for name, teacher in teachers.items() if teacher and teacher.weights]:
        yield _named(f"experiments.{name}.training.teacher.weights", weights, True, "is not here; put the teacher's weights there")
    if path := reliability.ood_path:
        yield _named("evaluation.reliability.ood_path", path, True, "is not here; put the folder or archive there")
    if (path := generate.inception_weights) and generate.extractor != "reference":
        named = _named("evaluation.generate.inception_weights", path, True, "is not here; put Inception's weights there")
        yield replace(named, exists=named.exists and Path(path).is_file())


def missing_files(profile: Profile) -> list[str]:
    """Missing files, a line each, that would be noticed only after trainings."""
    return [str(named) for named in named_files(profile) if named.needed and not named.exists]


def require_files(profile: Profile) -> None:
    """Raises ParamsError for missing_files."""
    if missing := missing_files(profile):
        raise ParamsError("\n".join(missing))
