"""Typed, validated settings of a profile (`params/<profile>.yaml`); other rooms import them from here.

`load` reports every problem at once, each with file, key path and what is allowed, before anything runs. It returns an immutable
Profile, whose experiments hold everything that they inherit. Perturbation budgets and attack steps are distances in [0, 1]
pixels; chain steps and image noise are in the internal range [-1, 1], as in the JEM family's papers.

types: constrained types, helpers on raw mappings. data, training, evaluation: the sections. profile: experiments and what they
inherit. problems: what validation reports. loading: files, overrides, names. strategies: what `ebjdat methods` lists.
"""

from ebjdat.names import STANDARD
from ebjdat.settings.data import DataSettings, ImbalanceSettings
from ebjdat.settings.evaluation import (
    AUTO,
    RELEASED,
    AdaptiveSettings,
    AttackSettings,
    AutoencoderSettings,
    EnsembleSettings,
    GenerateSettings,
    PGDSettings,
    ProtocolSettings,
    ReliabilitySettings,
    too_few_classes,
)
from ebjdat.settings.loading import (
    join_overrides,
    load,
    missing_files,
    named_files,
    require_files,
    run_name,
    split_overrides,
    usual_protocols,
)
from ebjdat.settings.profile import Experiment, Profile, ReportSettings, form_values
from ebjdat.settings.strategies import catalogue
from ebjdat.settings.training import (
    AdversarySettings,
    AugmentSettings,
    BudgetSettings,
    ChainSettings,
    ContrastSettings,
    ExampleWeights,
    HealingSettings,
    ModelSettings,
    OptimizerSettings,
    PolicySettings,
    Rung,
    ScheduleSettings,
    TeacherSettings,
    TrainingSettings,
    UpdateSettings,
    WeightSettings,
)
from ebjdat.settings.types import ParamsError, flat, merge, nearest

__all__ = [
    "AUTO",
    "RELEASED",
    "STANDARD",
    "AdaptiveSettings",
    "AdversarySettings",
    "AttackSettings",
    "AugmentSettings",
    "AutoencoderSettings",
    "BudgetSettings",
    "ChainSettings",
    "ContrastSettings",
    "DataSettings",
    "EnsembleSettings",
    "ExampleWeights",
    "Experiment",
    "GenerateSettings",
    "HealingSettings",
    "ImbalanceSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PGDSettings",
    "ParamsError",
    "PolicySettings",
    "Profile",
    "ProtocolSettings",
    "ReliabilitySettings",
    "ReportSettings",
    "Rung",
    "ScheduleSettings",
    "TeacherSettings",
    "TrainingSettings",
    "UpdateSettings",
    "WeightSettings",
    "catalogue",
    "flat",
    "form_values",
    "join_overrides",
    "load",
    "merge",
    "missing_files",
    "named_files",
    "nearest",
    "require_files",
    "run_name",
    "split_overrides",
    "too_few_classes",
    "usual_protocols",
]
