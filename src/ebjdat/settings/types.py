"""Constrained types that settings are made of, and helpers on raw nested mappings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from ebjdat import yamlfile
from ebjdat.errors import UserError
from ebjdat.names import AVERAGED
from ebjdat.pixels import Budget

LONGEST_NAME = 100  # characters of a name; it becomes part of folder names (at most 255 bytes) and of MLflow names
MOST_LISTED = 50  # problems or allowed names that a message lists


class ParamsError(UserError):
    """Everything that is wrong with the settings, one problem per line."""


def nearest(name: str, allowed: Sequence[str]) -> str:
    """The allowed names, after the one that `name` is probably a misspelling of, if any."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(sorted(allowed)[:MOST_LISTED])}"


def shown(value: Any) -> str:
    """A value as messages quote it: on one line, ASCII, at most 80 characters."""
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
    """YAML's yes, no, on and off are switches too, unless they are quoted."""
    if isinstance(value, yamlfile.Word):
        return value.truth
    if not isinstance(value, bool):
        raise ValueError(f"a valid boolean is true or false, found {shown(value)}")
    return value


def one_printable_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"printable characters on one line are allowed, found {shown(value)}")
    return value


def one_or_more(value: Any) -> Any:
    """A single name where a list of names may stand; null: none."""
    return (value,) if isinstance(value, str) else () if value is None else value


def unlike_other_results(protocol: str) -> str:
    """A protocol's name is part of names of results: it must not look like averaged weights' or like an interval's end."""
    if f"{protocol}_".startswith(AVERAGED) or protocol.endswith(("_low", "_high")):
        raise ValueError("prefix ema_ is reserved for averaged weights, endings _low and _high for intervals; use another name")
    return protocol


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


# Upper bounds refuse absurd values before they exhaust memory or time; no sensible profile comes near them.
MOST = 10**8  # images, iterations
LARGEST = 1e30  # real numbers; single precision ends at 3e38
Number = BeforeValidator(refuse_non_number)
StrictBool = Annotated[bool, Strict(), BeforeValidator(read_switch)]
Count = Annotated[int, Number, Field(ge=1, le=MOST)]
TwoOrMore = Annotated[int, Number, Field(ge=2, le=MOST)]  # a spread needs two
CountOrZero = Annotated[int, Number, Field(ge=0, le=MOST)]
Few = Annotated[int, Number, Field(ge=1, le=1000)]  # layers, threads, restarts
Steps = Annotated[int, Number, Field(ge=1, le=100_000)]  # sequential gradients
Batch = Annotated[int, Number, Field(ge=1, le=1_000_000)]  # images at once
Epochs = Annotated[int, Number, Field(ge=0, le=100_000)]
RandomSeed = Annotated[int, Number, Field(ge=0, lt=2**32)]  # scikit-learn's limit
Positive = Annotated[float, Number, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Number, Field(ge=0, le=LARGEST)]
Signed = Annotated[float, Number, Field(ge=-LARGEST, le=LARGEST)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(one_printable_line)]
Label = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(one_printable_line)]
Fraction01 = Annotated[float, Number, Field(ge=0, le=1)]
Epsilon = Annotated[Budget, Field(gt=0, le=1)]
EntryName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=LONGEST_NAME)]
ProtocolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=LONGEST_NAME), AfterValidator(unlike_other_results)]
Norm = Literal["Linf", "L2"]


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


def section(raw: Mapping[str, Any], path: str) -> Any:
    """The value at "a.b.c" of raw settings, or None."""
    value: Any = raw
    for key in path.split("."):
        value = mapping(value).get(key)
    return value


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
