"""Constrained types of settings, and helpers on their raw mappings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from ebjdat import yamlfile
from ebjdat.errors import UserError
from ebjdat.pixels import Budget

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]*$"
PROTOCOL_PATTERN = r"^[a-z][a-z0-9_]*$"  # part of metric names
LONGEST = 100  # characters of a name: of folders, with more added to it (a file system takes 255 bytes), and in MLflow

MOST_PROBLEMS = 50  # that are listed; one slip in a profile's common part may make many


class ParamsError(UserError):
    """Everything that is wrong with a profile, one problem per line."""


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Sentence that names the nearest allowed name, if one is near, and all of them."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(sorted(allowed)[:MOST_PROBLEMS])}"


def shown(value: Any) -> str:
    """A value as a message quotes it: on one line, ASCII, at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def known(names: Mapping[str, object]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"{shown(value)} is unknown; {nearest(value, list(names))}")
        return value

    return AfterValidator(check)


def refuse_non_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError(f"a number is allowed, found {shown(value)}")
    return value


def read_switch(value: Any) -> Any:
    """YAML's yes, no, on and off; in quotes they are text."""
    if isinstance(value, yamlfile.Word):
        return value.truth
    if not isinstance(value, bool):
        raise ValueError(f"a valid boolean is true or false, found {shown(value)}")
    return value


def one_printable_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"printable characters on one line are allowed, found {shown(value)}")
    return value


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


# Upper bounds refuse what cannot be meant before it runs out of memory or time; no honest profile meets them.
MOST = 10**8  # images, iterations
LARGEST = 1e30  # real numbers; single precision ends at 3e38
Number = BeforeValidator(refuse_non_number)
StrictBool = Annotated[bool, Strict(), BeforeValidator(read_switch)]
Count = Annotated[int, Number, Field(ge=1, le=MOST)]
TwoOrMore = Annotated[int, Number, Field(ge=2, le=MOST)]  # a spread needs two
CountOrZero = Annotated[int, Number, Field(ge=0, le=MOST)]
Few = Annotated[int, Number, Field(ge=1, le=1000)]  # layers, threads, restarts
Steps = Annotated[int, Number, Field(ge=1, le=100_000)]  # gradients, one after another
Batch = Annotated[int, Number, Field(ge=1, le=1_000_000)]  # images at once
Epochs = Annotated[int, Number, Field(ge=0, le=100_000)]
RandomSeed = Annotated[int, Number, Field(ge=0, lt=2**32)]  # scikit-learn takes no larger ones
Positive = Annotated[float, Number, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Number, Field(ge=0, le=LARGEST)]
Signed = Annotated[float, Number, Field(ge=-LARGEST, le=LARGEST)]
Line = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(one_printable_line)]
FilePath = Line
Label = Annotated[str, Field(min_length=1, max_length=LONGEST), AfterValidator(one_printable_line)]
Fraction01 = Annotated[float, Number, Field(ge=0, le=1)]
Epsilon = Annotated[Budget, Field(gt=0, le=1)]
EntryName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=LONGEST)]
ProtocolName = Annotated[str, Field(pattern=PROTOCOL_PATTERN, max_length=LONGEST)]
Norm = Literal["Linf", "L2"]


def section(raw: Mapping[str, Any], path: str) -> Any:
    """What stands at "a.b.c" of raw settings; None where nothing does."""
    value: Any = raw
    for key in path.split("."):
        value = mapping(value).get(key)
    return value


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged key by key; the later one wins."""
    result = dict(base)
    for override in overrides:
        for key, value in override.items():
            below = result.get(key)
            result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
