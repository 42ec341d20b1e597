"""What the tables of metrics share: when a metric is there, where not always, and what is measured under several names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ebjdat import registry
from ebjdat.vocabulary import Metric

BUFFER = "the method keeps a replay buffer (else null)"
INCEPTION, REFERENCE = "`frechet_extractor` is `inception` (else null)", "`frechet_extractor` is `reference` (else null)"
EMA = "training kept averaged weights (`training.ema`)"
ADVERSARIAL = "the method trains on adversarial neighbours"
CHAINS = "the method has chains"
WATCHED = "`training.healing.overfitting` is set, for methods that train on adversarial neighbours"
ENSEMBLE = "the protocol's ensemble was run (`n` above 0)"
UNIVERSAL = "`evaluation.attack.universal` is set"
SCREEN = "`evaluation.attack.screen` is set"
AUTOENCODER = "`evaluation.reliability.autoencoder` is set"
FOUND = "there is one (else null)"
ADAPTIVE = "the protocol's `adaptive_attacks` has the attack, and `n` is above 0"
SEEDS = "several seeds"
NAIVE = "`--against naive` (else null)"
GPU = "there is an NVIDIA GPU and nvidia-ml-py"
CLEAN = "the method sees clean images"
FOUR = "at least four samples (else null)"
OOD = "`evaluation.reliability.ood` has the set"
ANY_MODEL = "`ebjdat attack --model`"
TAUGHT = "the experiment has a teacher, and `evaluation.teacher` is set"
LONG_TAILED = "the profile has `data.imbalance`"
GROUPS = {"head": "of the largest 20 % of the classes", "tail": "of the smallest 80 % of the classes"}  # by training images
# What the energy stage lets PGD climb, beside the attack on cross-entropy (evaluation/energy.py).
ENERGY_ATTACKS = {
    "untargeted": "up the cross-entropy",
    "targeted": "down the cross-entropy of class (y + 1) mod K",
    "ascent": "up E",
    "energy_aware": "up CE − E",
}
# Sets of training images that the teacher stage compares (evaluation/teaching.py).
TEACHING = {
    "unlearned": "that no network of the recipe classifies under PGD",
    "learned": "that every network of the recipe classifies under PGD",
    "random": "drawn at random, as many as are not learned",
    "hardest": "with the largest cross-entropy without an attack, as many as are not learned",
}
LOGS = {log: [name for name, row in registry.METHODS.items() if log in row.logs] for row in registry.METHODS.values() for log in row.logs}


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def of(stage: str, *entries: Metric) -> tuple[Metric, ...]:
    """These entries, of one stage."""
    return tuple(replace(entry, stage=stage) for entry in entries)
