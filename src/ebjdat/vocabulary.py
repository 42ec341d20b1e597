"""What an entry of the table of metrics states, how its name is matched, and the document made from all entries.

In an entry's name, `[a|b]` is optional, `(a|b)` is one of the two, and `<x>` is one of the places: "[ema_][<protocol>_]pgd<steps>_acc".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from ebjdat.errors import UserError

KINDS = {"text": str, "hex": str, "settings": dict, "mapping": dict, "true or false": bool}  # units that are no numbers
NEVER_NULL = ("count", "seconds", "text", "hex", "mapping", "list", "epoch")  # first words of units; a measurement may be null
WORD, NUMBER = r"[A-Za-z]\w*?", r"\d+"


class UnknownNameError(UserError):
    """No metric has this name."""


@dataclass(frozen=True)
class Column:
    """A column of one of the report's tables of one seed.

    table: which. title: its heading; columns that share one fill in for each other. name: what it shows ("": the entry's own
    name), which may hold a `<place>`, then it is a column for each that was measured. n, spread: names of the sample size and
    the standard deviation shown with it. interval: `<name>_low` and `<name>_high` are (of `<attack>_acc`: `<attack>_low`). form,
    scale: how a number is written; by default fractions in percent.
    """

    table: Literal["attack", "universal", "screen", "energy", "samples", "reliability", "teacher"]
    title: str
    name: str = ""
    n: str = ""
    spread: str = ""
    interval: bool = False
    form: str = ""
    scale: float = 0


@dataclass(frozen=True)
class Metric:
    """An entry: one name, or a pattern of names, and everything that is known about it.

    better: "higher", "lower", or "" where neither is. only: when it exists ("": always). stage: the heading it belongs to.
    n: name of the count behind it, under the same protocol. interval: of one seed: "wilson" from its count `…_correct` of n,
    "normal" from its standard error `…_se`, for what is not negative; "signed" the same for what may be. paper: its key among the
    paper's numbers.

    Where its plain name is shown: summary: which column of summary.csv, from 1; released: which column under the protocol
    `released`. dvc: DVC compares these columns; bar: the title of its bar chart there. label: its column's title in the report's
    main table; panel: it also has a panel of the figure. columns: of tables of one seed. needed: files that must have it.
    """

    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    meaning: str
    only: str = ""
    stage: str = ""
    n: str = ""
    interval: Literal["wilson", "normal", "signed", ""] = ""
    paper: str = ""
    summary: int = 0
    released: int = 0
    dvc: bool = False
    bar: str = ""
    label: str = ""
    panel: bool = False
    columns: tuple[Column, ...] = ()
    needed: tuple[str, ...] = ()

    @property
    def is_pattern(self) -> bool:
        return any(mark in self.name for mark in "[(<")

    @property
    def percent(self) -> bool:
        """Tables show it in percent."""
        return self.unit == "fraction"

    @property
    def kind(self) -> type | tuple[type, ...]:
        """Python's type of its values in a JSON file, where it may be null as well."""
        return list if self.unit.startswith("list") else KINDS.get(self.unit, (int, float))

    @property
    def nullable(self) -> bool:
        """Whether a needed value may be null: a measurement is where nothing finite was measured."""
        return not self.unit.startswith(NEVER_NULL)

    @property
    def plain(self) -> str:
        """The name without what is optional; of PGD that with 20 steps."""
        return re.sub(r"\[.*?\]", "", self.name).replace("<steps>", "20")


class Vocabulary:
    """All entries, found by any name that one of them describes.

    places: what `<place>` may be: its explanation and the words allowed (none: any word, or any number).
    """

    def __init__(self, entries: tuple[Metric, ...], places: Mapping[str, tuple[str, Collection[str]]]) -> None:
        self.entries = entries
        self.places = places
        self.find = lru_cache(10_000)(self._find)
        self._patterns = cache(self._compiled)

    def describe(self, name: str, protocols: Collection[str] = ()) -> Metric:
        """The entry of a name, exact names before patterns: "released_pgd20_acc" -> "[ema_][<protocol>_]pgd<steps>_acc".

        protocols: the only ones that `<protocol>` may be; without them any word may. Raises UnknownNameError.
        """
        entry = self.find(name, frozenset(protocols))
        if entry is not None:
            return entry
        plain = {re.sub(r"\[.*?\]|[()<>]", "", metric.name): metric.name for metric in self.entries}
        close = [plain[near] for near in difflib.get_close_matches(name, plain, n=1)]
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownNameError(f"{name!r} is not measured; {hint}`ebjdat metrics` lists every name")

    def _find(self, name: str, protocols: frozenset[str] = frozenset()) -> Metric | None:
        """As `describe`; None where no entry has this name."""
        return next((metric for pattern, metric in self._patterns(protocols) if pattern.fullmatch(name)), None)

    def _compiled(self, protocols: frozenset[str]) -> tuple[tuple[re.Pattern[str], Metric], ...]:
        """Exact names first, then patterns without a free word, then longer before shorter: what ends in _low is no protocol's name."""
        order = sorted(self.entries, key=lambda m: (m.is_pattern, "<protocol>" in m.name, -len(m.name)))
        return tuple((self.pattern(metric.name, protocols), metric) for metric in order)

    def pattern(self, name: str, protocols: Collection[str] = ()) -> re.Pattern[str]:
        """An entry's name as a regular expression, with a group for each place."""

        def place(match: re.Match[str]) -> str:
            known = protocols if match[1] == "protocol" else self.places[match[1]][1]
            free = WORD if match[1] == "protocol" else NUMBER
            return f"(?P<{match[1]}>{'|'.join(map(re.escape, known)) or free})"

        return re.compile(re.sub(r"<(\w+)>", place, name.replace("[", "(?:").replace("]", ")?")))

    def markdown(self, stages: Mapping[str, str], summary: Collection[str]) -> str:
        """docs/metrics.md. stages: heading -> what stands below it; summary: columns of summary.csv."""
        lines = [
            "# Names of everything that is measured",
            "",
            "Made by `ebjdat metrics --markdown` from `src/ebjdat/metrics/`; change it there. `ebjdat metrics NAME` explains one name,",
            "`ebjdat metrics --json` is for programs. A name means the same in result files, `summary.csv`, DVC, MLflow and the report;",
            "[results-format](results-format.md) says where the files are.",
            "",
            "In names, `[a|b]` is optional, `(a|b)` is one of the two, and",
            "",
            *(f"- `<{name}>`: {meaning}{_listed(known)}" for name, (meaning, known) in self.places.items()),
            "",
            "Better: ↑ higher, ↓ lower, nothing: neither is. Fractions are from 0 to 1.",
            "",
            f"Columns of `summary.csv`, in this order{_listed(summary)}.",
        ]
        for stage, where in stages.items():
            lines += [
                "",
                f"## {stage.capitalize()}",
                "",
                where,
                "",
                "| name | meaning | unit | better | only where |",
                "|---|---|---|---|---|",
            ]
            lines += [_row(metric) for metric in self.entries if metric.stage == stage]
        return "\n".join(lines) + "\n"


def _row(metric: Metric) -> str:
    arrow = {"higher": "↑", "lower": "↓", "": ""}[metric.better]
    name, meaning, only = (text.replace("|", "\\|") for text in (metric.name, metric.meaning, metric.only))
    return f"| `{name}` | {meaning} | {metric.unit} | {arrow} | {only} |".replace("|  |", "| |")


def _listed(known: Collection[str]) -> str:
    return f": {', '.join(f'`{name}`' for name in known)}" if known else ""
