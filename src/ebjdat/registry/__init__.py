"""Every strategy by name: where it is implemented, where it comes from.

Plain data that imports no torch, so that settings are validated in milliseconds. `load` imports an implementation on first
use. To add a strategy, write one function, one row here, one test.

entries: what rows are. methods: objectives and their presets. strategies: what training is made from. evaluation: attacks,
protocols. data: data sets.
"""

from ebjdat.registry.data import EXTRA, MADE_SETS, OOD_SETS, SOURCES
from ebjdat.registry.entries import RELEASE, Entry, Family, Logged, Method, Preset, Source, implementation, load
from ebjdat.registry.evaluation import ADAPTIVE, ATTACKS, EXTRACTORS, FEWEST_CLASSES, PROTOCOLS, SAMPLE_PROTOCOLS
from ebjdat.registry.methods import BASES, FORMS, METHODS
from ebjdat.registry.strategies import BUDGETS, OPTIMIZERS, SAMPLERS, SAMPLES, SCHEDULES, SCORES, STARTS, UPDATES, WEIGHTINGS

__all__ = [
    "ADAPTIVE",
    "ATTACKS",
    "BASES",
    "BUDGETS",
    "EXTRA",
    "EXTRACTORS",
    "FEWEST_CLASSES",
    "FORMS",
    "MADE_SETS",
    "METHODS",
    "OOD_SETS",
    "OPTIMIZERS",
    "PROTOCOLS",
    "RELEASE",
    "SAMPLERS",
    "SAMPLES",
    "SAMPLE_PROTOCOLS",
    "SCHEDULES",
    "SCORES",
    "SOURCES",
    "STARTS",
    "UPDATES",
    "WEIGHTINGS",
    "Entry",
    "Family",
    "Logged",
    "Method",
    "Preset",
    "Source",
    "implementation",
    "load",
]
