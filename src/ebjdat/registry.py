"""Every strategy by name: where it is implemented, where it comes from.

Plain data that imports no torch, so that settings are validated in milliseconds. `load` imports an implementation on first
use. To add a strategy, write one function, one row here, one test.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

# What a method belongs to. energy: models p(x) as well; joint: that, and trained on adversarial neighbours; distilled: from a teacher.
Family = Literal["standard", "adversarial", "energy", "joint", "distilled"]


@dataclass(frozen=True)
class Entry:
    """A strategy: `target` is "module:function"; `source` is the paper or package it follows.

    reads: settings of its section that it uses; it ignores the others.
    """

    target: str
    source: str
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """Named settings: values without code. A profile's and an experiment's own values override them.

    on: for a form, what it changes on a preset of BASES.
    """

    source: str
    defaults: Mapping[str, Any]
    on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Logged:
    """A scalar that one method alone logs per epoch. better: "higher", "lower", or "" for neither."""

    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A training objective.

    reads: what it uses of `training.weights` beyond w1, w2, w3, align and energy_l2.
    samples: names in SAMPLES; a step makes each once, before the loss.
    selection: the validation score that picks the checkpoint unless the settings choose another.
    bases: presets of BASES that it can use, the first by default. forms: likewise of FORMS.
    defaults: training settings of the method; they override those of its base.
    logs: what it logs beyond the common cross-entropies, accuracies and energies; metrics.py explains these names.
    control: what has to be worse if the method's claim holds; "" for baselines and controls.
    """

    family: Family
    samples: tuple[str, ...] = ()
    selection: str = "clean"
    bases: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    logs: tuple[Logged, ...] = ()
    control: str = ""

    @property
    def has_chains(self) -> bool:
        """Whether it trains on chains, and so keeps a replay buffer."""
        return "negatives" in self.samples


@dataclass(frozen=True)
class Source(Entry):
    """A data set: its function takes the data settings and returns data.sources.Raw. reads: the data settings that are for it.

    train, test: its official numbers of images. test 0: it has no test split, so `data.test` of its images are drawn for one.
    shape: (channels, height, width) of an image. classes: how many. None, of each of these: only the data say.
    flip: whether a mirrored image keeps its label.
    downloads: what is fetched to `data.root` where it is missing. The function of a source that downloads also takes the splits to
    read and whether it may download (see data.sources.svhn).
    """

    train: int | None = None
    test: int | None = None
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    flip: bool = True
    downloads: str | None = None


# The code that "released" means. The paper links another address, whose release may differ.
RELEASE = "jkcjkc/EB-JDAT at 327ea16 (May 2025)"

_TRADES_ATTACK = {"adversary": {"score": "kl", "start": "gaussian", "mode": "eval"}}
_KL = Logged("kl", "nats", "lower", "KL(p(·|x) ‖ p(·|x̃))")
_ENERGY_CHANGE = Logged("energy_change", "nats", "lower", "mean |E(x) − E(x̃)|, of the points that the penalty is on")

_adversarial = partial(Method, family="adversarial", samples=("adversarial",), selection="robust", reads=("examples", "control"))
_consistent = partial(_adversarial, reads=("beta", "examples", "control"), logs=(_KL,))
_der = partial(_adversarial, reads=("delta", "examples", "control"), logs=(_ENERGY_CHANGE,))
_energy = partial(Method, family="energy", samples=("negatives",))

METHODS: Mapping[str, Method] = {
    "classifier": Method("ebjdat.objectives.recipes:classifier", "cross-entropy", family="standard"),
    "pgd_at": _adversarial("ebjdat.objectives.recipes:pgd_at", "Madry et al. 2018, arXiv 1706.06083"),
    "trades": _consistent(
        "ebjdat.objectives.recipes:trades",
        "TRADES, Zhang et al. 2019, arXiv 1901.08573",
        defaults=_TRADES_ATTACK,
        control="pgd_at, which has no clean images",
    ),
    "weat_nat": _consistent(
        "ebjdat.objectives.recipes:trades",
        "WEAT (natural), Mirza et al. 2024, arXiv 2407.06315",
        defaults={**_TRADES_ATTACK, "weights": {"beta": 6.0, "examples": {"name": "weat"}}},
        control="weights.control mean_matched: their mean for every image; shuffled: each weight on another image",
    ),
    "weat_adv": _consistent(
        "ebjdat.objectives.recipes:weat_adv",
        "WEAT (adversarial), Mirza et al. 2024, arXiv 2407.06315",
        defaults={**_TRADES_ATTACK, "weights": {"beta": 7.0, "examples": {"name": "weat"}}},
        control="as for weat_nat",
    ),
    "mart": _adversarial(
        "ebjdat.objectives.recipes:mart",
        "MART, Wang et al. 2020 (ICLR), YisenWang/MART",
        reads=("beta", "control"),
        defaults={"adversary": {"start": "gaussian", "mode": "eval"}, "weights": {"beta": 5.0}},
        logs=(_KL, Logged("bce", "nats", "lower", "−log p_y(x̃) − log(1 − max p_k(x̃)), k ≠ y")),
        control="weights.control mean_matched: the KL term weighs every image alike; shuffled: as other images would",
    ),
    "der": _der(
        "ebjdat.objectives.recipes:der",
        "DER-style, after arXiv 2505.22486; its form and strength are not confirmed",
        control="der_random: the same penalty at a random corner of the ball",
    ),
    "der_random": _der(
        "ebjdat.objectives.recipes:der_random",
        "control of der: the same penalty at a random corner of the ball",
        samples=("adversarial", "corner"),
    ),
    "s2o": _adversarial(
        "ebjdat.objectives.recipes:s2o",
        "S2O on PGD-AT, Jin et al., arXiv 2203.06020",
        reads=("targets", "examples", "control"),
        defaults={"adversary": {"mode": "eval"}, "weights": {"targets": 0.05}},
        logs=(Logged("second_order", "nats", "lower", "KL from S2O's targets, of x and x̃ together"),),
        control="weights.control mean_matched: the same target for every class, which is label smoothing; shuffled: those of another class",
    ),
    "s2o_trades": _consistent(
        "ebjdat.objectives.recipes:s2o_trades",
        "S2O on TRADES, Jin et al., arXiv 2203.06020",
        reads=("beta", "targets", "examples", "control"),
        defaults={**_TRADES_ATTACK, "weights": {"targets": 0.15, "beta": 6.0}},
        control="as for s2o",
    ),
    "fgsm": _adversarial(
        "ebjdat.objectives.recipes:pgd_at",
        "FGSM training, Goodfellow et al. 2015, arXiv 1412.6572",
        defaults={"adversary": {"start": "clean", "steps": 1, "step_ratio": 1.0}},
        control="corners: as far, in a random direction",
    ),
    "corners": _adversarial(
        "ebjdat.objectives.recipes:corners",
        "control of training on single steps: a random corner of the ball",
        samples=("corner",),
        reads=(),
        logs=(
            Logged("batch_corner_acc", "fraction", "higher", "accuracy on training images moved to random corners of their balls"),
            Logged("energy_corner", "nats", "", "mean energy of these"),
        ),
    ),
    "rs_fgsm": _adversarial(
        "ebjdat.objectives.recipes:pgd_at",
        "RS-FGSM, Wong et al. 2020, arXiv 2001.03994",
        defaults={"adversary": {"start": "uniform", "steps": 1, "step_ratio": 1.25}},
        control="corners; fgsm, which starts at the image",
    ),
    "n_fgsm": _adversarial(
        "ebjdat.objectives.recipes:pgd_at",
        "N-FGSM, de Jorge et al. 2022, arXiv 2202.01181",
        defaults={"adversary": {"start": "uniform", "start_ratio": 2.0, "steps": 1, "step_ratio": 1.0, "project": False}},
        control="corners; rs_fgsm, which stays in the ball",
    ),
    "gradalign": _adversarial(
        "ebjdat.objectives.recipes:gradalign",
        "GradAlign on FGSM, Andriushchenko & Flammarion 2020, arXiv 2007.02617",
        samples=("adversarial", "uniform"),
        reads=("delta", "examples", "control"),
        defaults={"adversary": {"start": "clean", "steps": 1, "step_ratio": 1.0}, "weights": {"delta": 0.2}},
        logs=(Logged("alignment", "fraction", "higher", "cosine of input gradients at x and at a uniform point of its ball"),),
        control="fgsm: the same without the penalty",
    ),
    "jem": _energy("ebjdat.objectives.recipes:jem", "JEM, Grathwohl et al. 2020, arXiv 1912.03263", bases=("jem",)),
    "jempp": _energy("ebjdat.objectives.recipes:jem", "JEM++, Yang & Ji 2021, arXiv 2109.09032", bases=("jempp",)),
    "sadajem": _energy("ebjdat.objectives.recipes:jem", "SADA-JEM, Yang et al. 2022, arXiv 2209.07959", bases=("sadajem",)),
    "eb_jdat": Method(
        "ebjdat.objectives.recipes:eb_jdat",
        "EB-JDAT, arXiv 2505.19459",
        family="joint",
        samples=("negatives", "adversarial"),
        selection="clean_and_robust",
        bases=("jempp", "jem", "sadajem"),
        forms=("paper", "released", "released_ce"),
        control="weights.w2 0: without the alignment",
    ),
}

# The JEM family: one objective, three presets.
_INFORMED = {"start": "class_gaussians", "noise": 0.0, "clamp": 1.0, "mode": "train"}
BASES: Mapping[str, Preset] = {
    "jem": Preset(
        "JEM, arXiv 1912.03263",
        {
            "chain": {"sampler": "sgld", "start": "uniform", "steps": 20, "step_size": 1.0, "noise": 0.01, "mode": "eval"},
            "optimizer": {"name": "adam", "lr": 1e-4, "momentum": 0.9, "weight_decay": 0.0},
        },
    ),
    "jempp": Preset(
        "JEM++, arXiv 2109.09032",
        {"chain": {"sampler": "pyld", "steps": 10, "inner_steps": 5, "step_size": 0.2, **_INFORMED}},
    ),
    "sadajem": Preset(
        "SADA-JEM, arXiv 2209.07959",
        {
            "chain": {"sampler": "clipped_sgld", "steps": 5, "step_size": 1.0, **_INFORMED},
            "update": {"name": "sam", "rho": 2.0, "adaptive": True},
            "augment": {"density": "plain", "noise": 0.0},
        },
    ),
}

# EB-JDAT as its paper defines it, and as its released code computes it: the alignment's sign and its clean images, the inner
# attack, its budget, noise on labelled images. released_ce: with the inner step that the released code has commented out.
_RELEASED_ATTACK = {"start": "uniform", "project": False, "range": "internal", "mode": "eval"}
_RELEASED_TERMS = {"weights": {"w2": -0.1, "align": "density"}, "density_batch": "own"}
_RELEASED_ON = {
    "jem": {"weights": {"w1": 0.45, "w2": -0.05, "w3": 0.45}, "augment": {"labelled_noise": 0.03}},
    "jempp": {"augment": {"labelled_noise": 0.03}},
}
FORMS: Mapping[str, Preset] = {
    "paper": Preset("arXiv 2505.19459", {"adversary": {"score": "energy"}}),
    "released": Preset(RELEASE, {"adversary": {"score": "released", **_RELEASED_ATTACK}, **_RELEASED_TERMS}, _RELEASED_ON),
    "released_ce": Preset(
        f"{RELEASE}, its commented-out cross-entropy step",
        {"adversary": {"score": "released_ce", **_RELEASED_ATTACK}, **_RELEASED_TERMS},
        _RELEASED_ON,
    ),
}

# What a loss needs besides the batch. A step makes each once, without gradients for the parameters.
SAMPLES: Mapping[str, Entry] = {
    "negatives": Entry("ebjdat.objectives.sampling:negatives", "persistent chains, arXiv 1912.03263"),
    "adversarial": Entry("ebjdat.objectives.sampling:adversarial", "projected gradient, arXiv 1706.06083"),
    "uniform": Entry("ebjdat.objectives.sampling:uniform", "a uniform point of the ball"),
    "corner": Entry("ebjdat.objectives.sampling:corner", "a random corner of the L-infinity ball"),
}

# Scores that adversarial neighbours ascend.
SCORES: Mapping[str, Entry] = {
    "ce": Entry("ebjdat.samplers.pgd:cross_entropy_score", "arXiv 1706.06083"),
    "kl": Entry("ebjdat.samplers.pgd:kl_score", "TRADES, arXiv 1901.08573"),
    "energy": Entry("ebjdat.samplers.pgd:joint_energy_score", "arXiv 2505.19459: reverse SGLD, conditioned on y"),
    "marginal_energy": Entry("ebjdat.samplers.pgd:marginal_energy_score", "up E(x) alone"),
    "targeted_ce": Entry("ebjdat.samplers.pgd:targeted_score", "down the cross-entropy of class (y + 1) mod K"),
    "energy_ce": Entry("ebjdat.samplers.pgd:energy_ce_score", "CE - E: adaptive, keeps the energy low"),
    "squared": Entry("ebjdat.samplers.pgd:squared_score", "SCORE, arXiv 2202.10103: |p(x~) - p(x)|^2"),
    "released": Entry("ebjdat.samplers.pgd:released_score", RELEASE),
    "released_ce": Entry("ebjdat.samplers.pgd:released_ce_score", f"{RELEASE}, commented out"),
}

SAMPLERS: Mapping[str, Entry] = {
    "sgld": Entry("ebjdat.samplers.sgld:sgld", "JEM, arXiv 1912.03263", reads=("steps", "step_size", "noise")),
    "clipped_sgld": Entry(
        "ebjdat.samplers.sgld:clipped_sgld", "SADA-JEM, arXiv 2209.07959", reads=("steps", "step_size", "noise", "clamp")
    ),
    "pyld": Entry("ebjdat.samplers.pyld:pyld", "JEM++, arXiv 2109.09032", reads=("steps", "inner_steps", "step_size", "noise", "clamp")),
}

STARTS: Mapping[str, Entry] = {
    "class_gaussians": Entry("ebjdat.samplers.starts:class_gaussians", "JEM++, arXiv 2109.09032"),
    "uniform": Entry("ebjdat.samplers.starts:uniform", "JEM, arXiv 1912.03263"),
    "data": Entry("ebjdat.samplers.starts:data", "contrastive divergence, Hinton 2002"),
}

UPDATES: Mapping[str, Entry] = {
    "plain": Entry("ebjdat.training.updates:plain", "one backward pass, one optimiser step"),
    "sam": Entry("ebjdat.training.updates:sam", "SAM, arXiv 2010.01412; adaptive: ASAM, arXiv 2102.11600", reads=("rho", "adaptive")),
    "awp": Entry("ebjdat.training.updates:awp", "AWP, Wu et al. 2020, arXiv 2004.05884", reads=("rho", "after")),
    "awp_random": Entry("ebjdat.training.updates:awp_random", "control of awp: random directions", reads=("rho", "after")),
}

# How much each example counts in the loss of an adversarial training.
WEIGHTINGS: Mapping[str, Entry] = {
    "uniform": Entry("ebjdat.objectives.weighting:uniform", "all alike"),
    "kl_dro": Entry("ebjdat.objectives.weighting:kl_dro", "KL-DRO, Hu & Hong 2013; the reducer of arXiv 2605.05415", reads=("radius",)),
    "term": Entry("ebjdat.objectives.weighting:term", "TERM, Li et al. 2021, arXiv 2007.01162", reads=("tilt",)),
    "weat": Entry("ebjdat.objectives.weighting:weat", "WEAT, Mirza et al. 2024, arXiv 2407.06315"),
}

OPTIMIZERS: Mapping[str, Entry] = {
    "sgd": Entry("ebjdat.training.updates:sgd", "torch.optim.SGD", reads=("momentum", "weight_decay")),
    "adam": Entry("ebjdat.training.updates:adam", "torch.optim.Adam; momentum: its first beta", reads=("momentum", "weight_decay")),
}

SCHEDULES: Mapping[str, Entry] = {
    "multistep": Entry(
        "ebjdat.training.schedules:multistep",
        "JEM family: linear warm-up, then x factor at milestones",
        reads=("warmup", "milestones", "factor"),
    ),
    "onecycle": Entry(
        "ebjdat.training.schedules:onecycle", "Smith & Topin 2018, arXiv 1708.07120 (linear up, linear down)", reads=("peak",)
    ),
    "constant": Entry("ebjdat.training.schedules:constant", "linear warm-up, then constant", reads=("warmup",)),
}

# Attacks of an ensemble, cheapest first.
ATTACKS: Mapping[str, Entry] = {
    "apgd_ce": Entry("ebjdat.evaluation.autoattack:apgd_ce", "APGD on cross-entropy, arXiv 2003.01690; pyautoattack", reads=("steps",)),
    "apgd_dlr": Entry("ebjdat.evaluation.autoattack:apgd_dlr", "APGD on DLR, untargeted, arXiv 2003.01690; pyautoattack", reads=("steps",)),
    "apgd_t": Entry(
        "ebjdat.evaluation.autoattack:apgd_t", "APGD on targeted DLR, arXiv 2003.01690; pyautoattack", reads=("steps", "targets")
    ),
    "fab": Entry("ebjdat.evaluation.autoattack:fab", "FAB, untargeted, arXiv 1907.02044; pyautoattack", reads=("steps", "range")),
    "fab_t": Entry(
        "ebjdat.evaluation.autoattack:fab_t", "FAB, targeted, arXiv 1907.02044; pyautoattack", reads=("steps", "targets", "range")
    ),
    "square": Entry("ebjdat.evaluation.autoattack:square", "Square, arXiv 1912.00049; pyautoattack", reads=("queries",)),
}
FEWEST_CLASSES: Mapping[str, int] = {"apgd_t": 4, "apgd_dlr": 3}  # with fewer, the attack's loss is undefined

# Evaluation protocols. A profile's protocol of the same name, or one that is `like` it, starts from these values.
_UNIT = {"norm": "Linf", "range": "unit", "noise": 0.0, "pgd": {"steps": 20}}
PROTOCOLS: Mapping[str, Preset] = {
    "standard": Preset(
        "RobustBench, arXiv 2010.09670: PGD-20 and AutoAttack standard, arXiv 2003.01690",
        {
            **_UNIT,
            "attacks": {
                "apgd_ce": {"steps": 100},
                "apgd_t": {"steps": 100, "targets": 9},
                "fab_t": {"steps": 100, "targets": 9},
                "square": {"queries": 5000},
            },
        },
    ),
    "standard_binary": Preset(
        "for two or three classes: `standard` with those attacks of AutoAttack, arXiv 2003.01690, whose losses are defined there",
        {
            **_UNIT,
            "attacks": {"apgd_ce": {"steps": 100}, "fab": {"steps": 100}, "square": {"queries": 5000}},
        },
    ),
    "released": Preset(
        f"the evaluation of {RELEASE}: half the radius, noise (none on SADA-JEM), a weaker ensemble",
        {
            "norm": "Linf",
            "range": "internal",
            "noise": 0.03,
            "noise_on": {"sadajem": 0.0},
            "pgd": {"steps": 20},
            "attacks": {
                "apgd_ce": {"steps": 20},
                "apgd_dlr": {"steps": 20},
                "fab_t": {"steps": 20, "targets": 9, "range": "internal"},
                "square": {"queries": 5000},
            },
        },
    ),
}

_torchvision = partial(Source, reads=("root",), shape=(3, 32, 32))

SOURCES: Mapping[str, Source] = {
    "digits": Source(
        "ebjdat.data.sources:digits",
        "scikit-learn's bundled UCI digits, 8x8",
        reads=("test",),
        train=1_797,
        test=0,
        shape=(1, 8, 8),
        classes=10,
        flip=False,
    ),
    "svhn": _torchvision(
        "ebjdat.data.sources:svhn",
        "Netzer et al. 2011, torchvision",
        train=73_257,
        test=26_032,
        classes=10,
        flip=False,
        downloads="test_32x32.mat",
    ),
    "cifar100": _torchvision(
        "ebjdat.data.sources:cifar100", "Krizhevsky 2009, torchvision", train=50_000, test=10_000, classes=100, downloads="cifar-100-python"
    ),
    "cifar10": _torchvision(
        "ebjdat.data.sources:cifar10",
        "Krizhevsky 2009, torchvision",
        train=50_000,
        test=10_000,
        classes=10,
        downloads="cifar-10-batches-py",
    ),
    "folder": Source(
        "ebjdat.data.sources:folder",
        "class folders, or an archive of them",
        reads=("path", "size", "channels", "background", "classes", "follow_links"),
    ),
}

EXTRACTORS: Mapping[str, Entry] = {
    "inception": Entry("ebjdat.evaluation.frechet:inception_features", "torch-fidelity, Inception-v3 pool3 (FID)"),
    "reference": Entry("ebjdat.evaluation.frechet:reference_features", "penultimate features of the reference classifier"),
}

# Out-of-distribution sets: made from the test images, or the test images of other sources.
OOD_SETS: Mapping[str, Entry] = {
    "noise": Entry("ebjdat.evaluation.ood:noise", "uniform in [0, 1]; Hendrycks & Gimpel 2017, arXiv 1610.02136"),
    "inverted": Entry("ebjdat.evaluation.ood:inverted", "1 - x: each image's negative"),
    "shuffled": Entry("ebjdat.evaluation.ood:shuffled", "x with its pixels permuted, each image in its own order"),
    **{name: source for name, source in SOURCES.items() if source.test != 0},
}

# Which samples are measured, against which images. A profile's protocol that is `like` one starts from its values.
SAMPLE_PROTOCOLS: Mapping[str, Preset] = {
    "standard": Preset(
        "Heusel et al. 2017, arXiv 1706.08500: fresh samples, none discarded", {"source": "fresh", "select": 1.0, "against": "train"}
    ),
    "released": Preset(
        f"the evaluation of {RELEASE}: the most confident of the training buffer, against every image there is",
        {"source": "buffer", "select": 0.9, "against": "all"},
    ),
}


def load(registry: Mapping[str, Entry], name: str) -> Callable[..., Any]:
    """Import and return the implementation of `name`."""
    function: Callable[..., Any] = pkgutil.resolve_name(registry[name].target)
    return function
