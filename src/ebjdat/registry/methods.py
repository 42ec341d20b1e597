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
_KL_TEACHER = Logged("kl_teacher", "nats", "lower", "KL of the student's probabilities at x̃ from the teacher's, with ARD's temperature")
_distilled = partial(
    Method,
    family="distilled",
    samples=("adversarial", "taught"),
    selection="robust",
    reads=("control",),
    logs=(_KL_TEACHER,),
    control="weights.control mean_matched: the teacher's mean confidence and no more (label smoothing); shuffled: what it says of "
    "another image's other classes; the same with an ordinary classifier as teacher",
)
_jacobian = partial(
    _adversarial,
    reads=("delta", "examples", "control", "smoothing"),
    second_order=True,
    logs=(Logged("jacobian", "squared logits", "lower", "mean |J u|², J of the logits by pixels of [−1, 1], u as the method samples it"),),
)
_jeat = partial(Method, family="joint", selection="clean_and_robust", defaults={"adversary": {"score": "energy"}})
_CORNER = (
    Logged("batch_corner_acc", "fraction", "higher", "accuracy on training images moved to random corners of their balls"),
    Logged("energy_corner", "nats", "", "mean energy of these"),
)
_JEM_FAMILY = ("jempp", "jem", "sadajem")
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
    "at_bsl": _adversarial(
        "ebjdat.objectives.longtail:at_bsl",
        "AT-BSL, Yue et al. 2024, arXiv 2403.10073; balanced softmax, Ren et al. 2020, arXiv 2007.10740",
        samples=("adversarial", "log_counts"),
        logs=(Logged("ce_balanced", "nats", "lower", "cross-entropy of adversarial neighbours, logits shifted by log n_c"),),
        control="pgd_at with the same augmentation: the same without the shift",
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
        logs=_CORNER,
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
        second_order=True,
        logs=(Logged("alignment", "fraction", "higher", "cosine of input gradients at x and at a uniform point of its ball"),),
        control="fgsm: the same without the penalty",
    ),
    "ard": _distilled(
        "ebjdat.objectives.distilled:ard",
        "ARD, Goldblum et al. 2020, arXiv 1905.09747",
        reads=("taught", "temperature", "control"),
        defaults={"weights": {"taught": 1.0, "temperature": 30.0}},
    ),
    "rslad": _distilled(
        "ebjdat.objectives.distilled:rslad",
        "RSLAD, Zi et al. 2021, arXiv 2108.07969",
        reads=("taught", "control"),
        defaults={"adversary": {"score": "kl_teacher", "start": "gaussian", "mode": "eval"}, "weights": {"taught": 5 / 6}},
    ),
    "iad": _distilled(
        "ebjdat.objectives.distilled:iad",
        "IAD-I, Zhu et al. 2022 (ICLR)",
        samples=("adversarial", "taught", "taught_adversarial", "trust"),
        reads=("alone", "trust", "control"),
        logs=(_KL_TEACHER, Logged("trust", "fraction", "", "mean reliability of the teacher, T_y(x̃)^trust")),
    ),
    "adaad": _distilled(
        "ebjdat.objectives.distilled:adaad",
        "AdaAD, Huang et al. 2023 (CVPR)",
        samples=("adversarial", "taught_adversarial"),
        defaults={"adversary": {"score": "kl_disagree", "start": "gaussian", "mode": "eval"}},
    ),
    "las_at": _adversarial(
        "ebjdat.objectives.las_at:las_at",
        "LAS-AT, Jia et al. 2022, arXiv 2203.06616; its policy is a small WRN here, a ResNet-18 there",
        samples=("policy",),
        reads=("examples", "control"),  # its labels are smoothed as published
        state="ebjdat.objectives.las_at:policy",
        defaults={"adversary": {"start": "uniform", "mode": "eval"}},
        logs=(
            Logged("policy_eps", "policy.unit", "", "radius that the policy chose, mean over images"),
            Logged("policy_steps", "steps", "", "steps of the attack that it chose"),
            Logged("policy_step", "policy.unit", "", "size of a step that it chose"),
            Logged(
                "policy_reward", "nats and fractions", "higher", "its last reward: min(CE(x̃), 10) + 4 robust accuracy + 2 clean accuracy"
            ),
        ),
        control="policy.choose uniform: the same ranges at random; single numbers for ranges: their mean for every image; and with "
        "adversary.budget ramp: growing linearly",
    ),
    "half_at": _adversarial(
        "ebjdat.objectives.penalties:half_at", "clean and adversarial images in equal parts, Goodfellow et al. 2015, arXiv 1412.6572"
    ),
    "matched_jacobian": _jacobian(
        "ebjdat.objectives.penalties:matched_jacobian",
        "matched Jacobian penalty on cross-entropy, the first order of PMH, after arXiv 2605.22800",
        samples=("adversarial", "nuisance"),
        control="jacobian_isotropic and jacobian_shuffled; the claim is matched better than isotropic better than jacobian_complement",
    ),
    "jacobian_isotropic": _jacobian(
        "ebjdat.objectives.penalties:jacobian_isotropic",
        "control of matched_jacobian: displacements as long, in directions that are all alike",
        samples=("adversarial", "nuisance_isotropic"),
    ),
    "jacobian_complement": _jacobian(
        "ebjdat.objectives.penalties:jacobian_complement",
        "control of matched_jacobian and of its isotropic control: displacements as long, in the wrong subspace",
        samples=("adversarial", "nuisance_complement"),
    ),
    "jacobian_shuffled": _jacobian(
        "ebjdat.objectives.penalties:jacobian_shuffled",
        "control of matched_jacobian: the covariance of differences to other images' neighbours",
        samples=("adversarial", "nuisance_shuffled"),
    ),
    "egat_style": _adversarial(
        "ebjdat.objectives.penalties:egat_style",
        "EGAT-style, after arXiv 2603.01938; its loss and strength are not confirmed",
        reads=("delta", "control", "smoothing"),
        second_order=True,
        logs=(Logged("saliency", "fraction", "higher", "cosine of |input gradients of z_y| at x and x̃, as the penalty pairs them"),),
        control="weights.control shuffled: another image's saliency as the target; pgd_at with one more inner step, for equal compute",
    ),
    "aat_style": _adversarial(
        "ebjdat.objectives.penalties:aat_style",
        "AAT-style: BiRQA's anchored adversarial training (2026, image quality) for classifiers; its loss is not confirmed",
        reads=("delta", "control", "smoothing"),
        logs=(Logged("ranking", "logits", "lower", "mean by which attacked images fall behind clean ones that they led, beyond a margin"),),
        control="half_at: clean images without ranks; weights.control shuffled: the anchors of other pairs",
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
        bases=_JEM_FAMILY,
        forms=("paper", "released", "released_ce"),
        control="weights.w2 0: without the alignment",
    ),
    # joint: its logsumexp is trained as a density of images (it generates by climbing that), and its cross-entropy on neighbours
    "dat": Method(
        "ebjdat.objectives.dat:dat",
        "DAT, second stage, arXiv 2510.13872; its images of another data set are made ones here",
        family="joint",
        samples=("adversarial", "contrast"),
        state="ebjdat.objectives.dat:growth",
        selection="clean_and_robust",
        reads=(),
        defaults={
            "mode": "eval",
            "optimizer": {"lr": 0.001},
            "schedule": {"name": "constant"},
            "adversary": {"norm": "L2", "eps": 0.5, "steps": 10, "step_size": 0.1, "mode": "eval"},
            "augment": {"noise": 0.0},
        },
        logs=(
            Logged("bce_data", "nats", "lower", "cross-entropy of data against x-, with −E as the logit"),
            Logged("auc", "fraction", "", "area under the ROC curve of −E, data against x-, in a batch"),
            Logged("energy_contrast", "nats", "", "mean energy of x-"),
            Logged("contrast_steps", "steps", "", "how many steps x- climb"),
        ),
        control="contrast.most 0: x- never climb; contrast.direction random: as far, in a random direction; mode train: batch norm is not "
        "frozen; adversary.norm Linf",
    ),
    "jeat_style": _jeat(
        "ebjdat.objectives.penalties:jeat_style",
        "JEAT-style, after arXiv 2108.09093; its loss is not confirmed",
        samples=("negatives", "adversarial"),
        bases=_JEM_FAMILY,
        control="jeat_noise: without the attack; jeat_no_chains: without the generative half",
    ),
    "jeat_noise": _jeat(
        "ebjdat.objectives.penalties:jeat_noise",
        "control of jeat_style: a random corner of the ball instead of the adversarial neighbour",
        samples=("negatives", "corner"),
        bases=_JEM_FAMILY,
        defaults={},
        logs=_CORNER,
    ),
    "jeat_no_chains": _jeat(
        "ebjdat.objectives.penalties:jeat_no_chains",
        "control of jeat_style: images instead of chains",
        samples=("adversarial",),
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
