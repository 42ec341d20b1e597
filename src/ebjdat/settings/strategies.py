"""What `ebjdat methods` lists: every strategy with its source and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ebjdat import registry
from ebjdat.settings.profile import base_of, form_of, presets
from ebjdat.settings.training import ChainSettings, OptimizerSettings, ScheduleSettings, UpdateSettings
from ebjdat.settings.types import flat, merge


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
        "updates": entries(registry.UPDATES, UpdateSettings),
        "optimizers": entries(registry.OPTIMIZERS, OptimizerSettings),
        "schedules": entries(registry.SCHEDULES, ScheduleSettings),
    }
