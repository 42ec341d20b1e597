"""Typed, validated settings of a profile (`params/<profile>.yaml`).

`load` reports every problem at once, each with file, key path and what is allowed, before anything runs. What it returns
is immutable. All perturbation budgets and attack steps are distances in [0, 1] pixels; chain steps and image noise are in
the internal range [-1, 1], as the JEM family states them.

types: constrained types and helpers. data, training, evaluation: a profile's sections. profile: experiments and their resolution.
loading: files, overrides, problems, names.
"""

from ebjdat.settings.data import DataSettings
from ebjdat.settings.evaluation import (
    AUTO,
    RELEASED,
    STANDARD,
    AttackSettings,
    EnsembleSettings,
    GenerateSettings,
    PGDSettings,
    ProtocolSettings,
    ReliabilitySettings,
    prefix_of,
    too_few_classes,
)
from ebjdat.settings.loading import (
    join_overrides,
    load,
    lost_files,
    named_files,
    read_layers,
    require_files,
    run_name,
    split_overrides,
    usual_protocols,
)
from ebjdat.settings.profile import Profile, ReportSettings, base_of, catalogue, form_of, form_values, section_names
from ebjdat.settings.training import (
    AdversarySettings,
    AugmentSettings,
    ChainSettings,
    HealingSettings,
    ModelSettings,
    OptimizerSettings,
    Rung,
    ScheduleSettings,
    TrainingSettings,
    UpdateSettings,
    WeightSettings,
)
from ebjdat.settings.types import ParamsError, flat, merge, nearest, section

__all__ = [
    "AUTO",
    "RELEASED",
    "STANDARD",
    "AdversarySettings",
    "AttackSettings",
    "AugmentSettings",
    "ChainSettings",
    "DataSettings",
    "EnsembleSettings",
    "GenerateSettings",
    "HealingSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PGDSettings",
    "ParamsError",
    "Profile",
    "ProtocolSettings",
    "ReliabilitySettings",
    "ReportSettings",
    "Rung",
    "ScheduleSettings",
    "TrainingSettings",
    "UpdateSettings",
    "WeightSettings",
    "base_of",
    "catalogue",
    "flat",
    "form_of",
    "form_values",
    "join_overrides",
    "load",
    "lost_files",
    "merge",
    "named_files",
    "nearest",
    "prefix_of",
    "read_layers",
    "require_files",
    "run_name",
    "section",
    "section_names",
    "split_overrides",
    "too_few_classes",
    "usual_protocols",
]
