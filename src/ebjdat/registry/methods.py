"""Methods, and the presets that they build on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ebjdat.registry.entries import RELEASE, Logged, Method, Preset

_TRADES_ATTACK = {"adversary": {"score": "kl", "start": "gaussian", "mode": "eval"}}
# A single step. It may end in catastrophic overfitting, which a check sees (Wong et al. 2020 stop when PGD accuracy fell by 0.2).
_ONE_STEP = {"healing": {"overfitting": 0.2}}
_KL = Logged("kl", "nats", "lower", "KL(p(·|x) ‖ p(·|x̃))")
_ENERGY_CHANGE = Logged("energy_change", "nats", "lower", "mean |E(x) − E(x̃)|, of the points that the penalty is on")

_adversarial = partial(
    Method, family="adversarial", samples=("adversarial",), selection="robust", reads=("examples", "control", "smoothing")
)
_consistent = partial(_adversarial, reads=("beta", "examples", "control", "smoothing"), logs=(_KL,))
_der = partial(_adversarial, reads=("delta", "examples", "control", "smoothing"), logs=(_ENERGY_CHANGE,))
_energy = partial(Method, family="energy", samples=("negatives",), reads=("smoothing",))

METHODS: Mapping[str, Method] = {
    "classifier": Method("ebjdat.objectives.recipes:classifier", "cross-entropy", family="standard", reads=("smoothing",)),
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
        defaults={"adversary": {"start": "clean", "steps": 1, "step_ratio": 1.0}, **_ONE_STEP},
        control="corners: as far, in a random direction",
    ),
    "corners": _adversarial(
        "ebjdat.objectives.recipes:corners",
        "control of training on single steps: a random corner of the ball",
        samples=("corner",),
        reads=("smoothing",),
        logs=(
            Logged("batch_corner_acc", "fraction", "higher", "accuracy on training images moved to random corners of their balls"),
            Logged("energy_corner", "nats", "", "mean energy of these"),
        ),
    ),
    "rs_fgsm": _adversarial(
        "ebjdat.objectives.recipes:pgd_at",
        "RS-FGSM, Wong et al. 2020, arXiv 2001.03994",
        defaults={"adversary": {"start": "uniform", "steps": 1, "step_ratio": 1.25}, **_ONE_STEP},
        control="corners; fgsm, which starts at the image",
    ),
    "n_fgsm": _adversarial(
        "ebjdat.objectives.recipes:pgd_at",
        "N-FGSM, de Jorge et al. 2022, arXiv 2202.01181",
        defaults={"adversary": {"start": "uniform", "start_ratio": 2.0, "steps": 1, "step_ratio": 1.0, "project": False}, **_ONE_STEP},
        control="corners; rs_fgsm, which stays in the ball",
    ),
    "gradalign": _adversarial(
        "ebjdat.objectives.recipes:gradalign",
        "GradAlign on FGSM, Andriushchenko & Flammarion 2020, arXiv 2007.02617",
        samples=("adversarial", "uniform"),
        reads=("delta", "examples", "control", "smoothing"),
        defaults={"adversary": {"start": "clean", "steps": 1, "step_ratio": 1.0}, "weights": {"delta": 0.2}, **_ONE_STEP},
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
        reads=("smoothing",),
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
