"""Names of results. One function makes flat names from nested results, one takes a flat name apart.

A name is `[ema_][<protocol>_][<attack>_]<statistic>`: "released_pgd20_acc". Evaluation makes such names without the table of
metrics; the package metrics explains them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ebjdat.registry import ADAPTIVE, ATTACKS

STANDARD = "standard"  # the protocol of the main results, whose names have no prefix
UNIVERSAL = ("universal", "universal_random")  # one perturbation for all images, and its control
AVERAGED = "ema_"  # prefix of results of averaged weights


def _one_of(names: Collection[str]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


ATTACKED = re.compile(
    rf"(?P<attack>clean|pgd\d+|autoattack|{_one_of((*ADAPTIVE, *UNIVERSAL))}|after_(?:{_one_of(ATTACKS)}))_(?P<statistic>\w+)"
)


@dataclass(frozen=True)
class ResultName:
    """A name taken apart. attack: "" where the statistic belongs to the protocol as a whole. averaged: of averaged weights."""

    statistic: str
    attack: str = ""
    protocol: str = STANDARD
    averaged: bool = False


def flat_name(statistic: str, attack: str = "", protocol: str = STANDARD, averaged: bool = False) -> str:
    """`flat_name("acc", "pgd20", "released")` -> "released_pgd20_acc"."""
    prefix = AVERAGED if averaged else ""
    return prefix + "_".join(part for part in ("" if protocol == STANDARD else protocol, attack, statistic) if part)


def flat_results(nested: Mapping[str, Mapping[str, Mapping[str, Any]]], averaged: bool = False) -> dict[str, Any]:
    """protocol -> attack -> statistic -> value, as one flat dictionary; the attack "" holds what belongs to the protocol as a whole."""
    return {
        flat_name(statistic, attack, protocol, averaged): value
        for protocol, attacks in nested.items()
        for attack, statistics in attacks.items()
        for statistic, value in statistics.items()
    }


def take_apart(name: str, protocols: Collection[str] = ()) -> ResultName:
    """The parts of a flat name: the inverse of `flat_name`. protocols: those of the settings; other prefixes are part of the statistic."""
    rest = name.removeprefix(AVERAGED)
    protocol = next((p for p in sorted(protocols, key=len, reverse=True) if p != STANDARD and rest.startswith(f"{p}_")), STANDARD)
    rest = rest if protocol == STANDARD else rest.removeprefix(f"{protocol}_")
    parts = ATTACKED.fullmatch(rest)
    attack, statistic = parts.groups() if parts else ("", rest)
    return ResultName(statistic, attack, protocol, name.startswith(AVERAGED))
