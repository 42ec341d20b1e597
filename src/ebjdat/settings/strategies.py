"""What `ebjdat methods` lists: every strategy with its source and its defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ebjdat import registry
from ebjdat.settings.profile import base_of, form_of, presets
from ebjdat.settings.training import BudgetSettings, ChainSettings, ExampleWeights, OptimizerSettings, ScheduleSettings, UpdateSettings
from ebjdat.settings.types import flat, merge


def catalogue() -> dict[str, dict[str, dict[str, Any]]]:
    """Every strategy by kind and name: its source, its implementation, and its defaults (what a profile may override)."""

    def entries(names: Mapping[str, registry.Entry], section: type[BaseModel] | None = None) -> dict[str, dict[str, Any]]:
        defaults = section.model_construct().model_dump() if section else {}
        return {
            name: {"source": e.source, "implementation": e.target, "defaults": {key: defaults[key] for key in e.reads if section}}
            for name, e in names.items()
        }

    methods = {
        name: {
            "source": m.source,
            "implementation": m.target,
            "family": m.family,
            "samples": list(m.samples),
            "selection": m.selection,
            "bases": list(m.bases),
            "forms": list(m.forms),
            "control": m.control,
            "defaults": merge({}, *presets(name, base_of(name, None), form_of(name, None), {})),
        }
        for name, m in registry.METHODS.items()
    }
    named = {
        kind: {name: {"source": preset.source, "on": flat(preset.on), "defaults": dict(preset.defaults)} for name, preset in names.items()}
        for kind, names in (("bases", registry.BASES), ("forms", registry.FORMS))
    }
    return {
        "methods": methods,
        **named,
        "samplers": entries(registry.SAMPLERS, ChainSettings),
        "starts": entries(registry.STARTS),
        "scores": entries(registry.SCORES),
        "budgets": entries(registry.BUDGETS, BudgetSettings),
        "updates": entries(registry.UPDATES, UpdateSettings),
        "weights of examples": entries(registry.WEIGHTINGS, ExampleWeights),
        "optimizers": entries(registry.OPTIMIZERS, OptimizerSettings),
        "schedules": entries(registry.SCHEDULES, ScheduleSettings),
    }


HEAD = """\
# Methods

Made by `ebjdat methods --markdown` from `src/ebjdat/registry/` and the functions that it names; change it there. x̃ is written
`x~`, chains `x-`; p is the softmax of the logits, E(x) = -logsumexp of them, E(x, y) = -z_y. "-style": the paper's form or strength is
not confirmed.
"""


OTHERS: Mapping[str, Mapping[str, registry.Entry]] = {
    "Scores of the inner maximisation": registry.SCORES,
    "Budgets of the adversary": registry.BUDGETS,
    "Updates": registry.UPDATES,
    "Weights of examples": registry.WEIGHTINGS,
    "Samplers": registry.SAMPLERS,
    "Chain starts": registry.STARTS,
}


def markdown() -> str:
    """docs/methods.md: each method's loss in words, source, family, control, defaults; then the other strategies."""
    kinds = catalogue()
    parts = [HEAD]
    for name, entry in kinds["methods"].items():
        says = inspect.cleandoc(registry.load(registry.METHODS, name).__doc__ or "")
        defaults = ", ".join(f"`{key}: {value}`" for key, value in flat(entry["defaults"]).items())
        facts = [f"Source: {entry['source']}.", f"Family: {entry['family']}."]
        facts += [f"Control: {entry['control']}."] if entry["control"] else []
        facts += [f"Defaults: {defaults}."] if defaults else []
        parts.append(f"## {name}\n\n{says}\n\n{' '.join(facts)}\n")
    for kind, entries in OTHERS.items():
        lines = [f"| `{name}` | {_first_line(entries, name)} | {_cell(entry.source)} |" for name, entry in entries.items()]
        parts.append("\n".join([f"## {kind}\n", "| name | what it does | source |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _first_line(entries: Mapping[str, registry.Entry], name: str) -> str:
    return _cell((registry.load(entries, name).__doc__ or "").strip().splitlines()[0])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
