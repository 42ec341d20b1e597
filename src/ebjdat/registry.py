"""Every strategy by name: where it is implemented, where it comes from.

Plain data without imports of torch, so that settings can be validated in milliseconds. `load` imports the implementation
on first use. Adding a strategy is one function, one line here, one test.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A strategy: `target` is "module:function"; `source` is the paper or package it follows."""

    target: str
    source: str


@dataclass(frozen=True)
class Method(Entry):
    """A training objective.

    draws: names in DRAWS that are made once per step, before the loss.
    selection: the validation score that picks the checkpoint unless the settings say otherwise.
    defaults: training settings that belong to the method; an experiment's own overrides win over them.
    """

    draws: tuple[str, ...] = ()
    selection: str = "clean"
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "classifier": Method("ebjdat.objectives.recipes:classifier", "cross-entropy"),
    "pgd_at": Method(
        "ebjdat.objectives.recipes:pgd_at",
        "Madry et al. 2018, arXiv 1706.06083",
        draws=("adversarial",),
        selection="robust",
    ),
    "jempp": Method(
        "ebjdat.objectives.recipes:jem",
        "JEM++, Yang & Ji 2021, arXiv 2109.09032",
        draws=("negatives",),
    ),
    "eb_jdat": Method(
        "ebjdat.objectives.recipes:eb_jdat",
        "EB-JDAT, arXiv 2505.19459, paper's form",
        draws=("negatives", "adversarial"),
        selection="clean_and_robust",
        defaults={"adversary": {"score": "energy"}},
    ),
}

# What a loss needs beside the batch; each is drawn once per step without gradients for the parameters.
DRAWS: Mapping[str, Entry] = {
    "negatives": Entry("ebjdat.objectives.draws:negatives", "persistent chains, arXiv 1912.03263"),
    "adversarial": Entry("ebjdat.objectives.draws:adversarial", "projected gradient, arXiv 1706.06083"),
}

# Score whose ascent makes an adversarial neighbour.
SCORES: Mapping[str, Entry] = {
    "ce": Entry("ebjdat.samplers.pgd:cross_entropy_score", "arXiv 1706.06083"),
    "energy": Entry("ebjdat.samplers.pgd:joint_energy_score", "arXiv 2505.19459: reverse SGLD, conditioned on y"),
}

SAMPLERS: Mapping[str, Entry] = {
    "pyld": Entry("ebjdat.samplers.pyld:pyld", "JEM++, arXiv 2109.09032"),
}

STARTS: Mapping[str, Entry] = {
    "class_gaussians": Entry("ebjdat.samplers.starts:class_gaussians", "JEM++, arXiv 2109.09032"),
    "uniform": Entry("ebjdat.samplers.starts:uniform", "JEM, arXiv 1912.03263"),
}

UPDATES: Mapping[str, Entry] = {
    "plain": Entry("ebjdat.training.updates:plain", "one backward pass, one optimiser step"),
}

OPTIMIZERS: Mapping[str, Entry] = {
    "sgd": Entry("ebjdat.training.updates:sgd", "torch.optim.SGD"),
    "adam": Entry("ebjdat.training.updates:adam", "torch.optim.Adam"),
}

SCHEDULES: Mapping[str, Entry] = {
    "multistep": Entry("ebjdat.training.schedules:multistep", "JEM family: linear warm-up, then x factor at milestones"),
    "onecycle": Entry("ebjdat.training.schedules:onecycle", "Smith & Topin 2018, arXiv 1708.07120 (linear up, linear down)"),
    "constant": Entry("ebjdat.training.schedules:constant", "linear warm-up, then constant"),
}

SOURCES: Mapping[str, Entry] = {
    "digits": Entry("ebjdat.data.sources:digits", "scikit-learn's bundled UCI digits, 8x8"),
    "cifar10": Entry("ebjdat.data.sources:cifar10", "torchvision"),
    "cifar100": Entry("ebjdat.data.sources:cifar100", "torchvision"),
    "svhn": Entry("ebjdat.data.sources:svhn", "torchvision"),
    "folder": Entry("ebjdat.data.sources:folder", "class folders, or an archive of them"),
}

EXTRACTORS: Mapping[str, Entry] = {
    "inception": Entry("ebjdat.evaluation.frechet:inception_features", "torch-fidelity, Inception-v3 pool3 (FID)"),
    "reference": Entry("ebjdat.evaluation.frechet:reference_features", "penultimate features of the reference classifier"),
}


def load(registry: Mapping[str, Entry], name: str) -> Callable[..., Any]:
    """Import and return the implementation of `name`."""
    function: Callable[..., Any] = pkgutil.resolve_name(registry[name].target)
    return function
