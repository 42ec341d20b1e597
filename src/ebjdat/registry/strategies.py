"""What methods are trained with: samples, scores, chains, updates, weights of examples, optimisers, schedules."""

from __future__ import annotations

from collections.abc import Mapping

from ebjdat.registry.entries import RELEASE, Entry

# What a loss needs besides the batch. A step makes each once, in the method's order, without gradients for the parameters.
SAMPLES: Mapping[str, Entry] = {
    "negatives": Entry("ebjdat.objectives.sampling:negatives", "persistent chains, arXiv 1912.03263"),
    "adversarial": Entry("ebjdat.objectives.sampling:adversarial", "projected gradient, arXiv 1706.06083"),
    "taught": Entry("ebjdat.objectives.sampling:taught", "the teacher's logits of the images"),
    "taught_adversarial": Entry("ebjdat.objectives.sampling:taught_adversarial", "the teacher's logits of the adversarial neighbours"),
    "trust": Entry("ebjdat.objectives.sampling:trust", "IAD, Zhu et al. 2022 (ICLR)"),
    "uniform": Entry("ebjdat.objectives.sampling:uniform", "a uniform point of the ball"),
    "corner": Entry("ebjdat.objectives.sampling:corner", "a random corner of the L-infinity ball"),
    "contrast": Entry("ebjdat.objectives.dat:contrast", "images out of distribution that climb the density, arXiv 2510.13872"),
    "policy": Entry("ebjdat.objectives.las_at:by_policy", "projected gradient whose budget a policy chooses, arXiv 2203.06616"),
    "log_counts": Entry("ebjdat.objectives.sampling:log_counts", "how frequent each class is in the training split"),
    "nuisance": Entry("ebjdat.objectives.sampling:nuisance", "after arXiv 2605.22800: normal, with the covariance of x~ - x"),
    "nuisance_isotropic": Entry("ebjdat.objectives.sampling:nuisance_isotropic", "control of nuisance: all directions alike"),
    "nuisance_complement": Entry("ebjdat.objectives.sampling:nuisance_complement", "control of nuisance: orthogonal to all x~ - x"),
    "nuisance_shuffled": Entry("ebjdat.objectives.sampling:nuisance_shuffled", "control of nuisance: x~ of other images"),
}

# Scores that adversarial neighbours ascend. reads: what their functions take beside network, images and labels.
SCORES: Mapping[str, Entry] = {
    "ce": Entry("ebjdat.samplers.pgd:cross_entropy_score", "arXiv 1706.06083"),
    "kl": Entry("ebjdat.samplers.pgd:kl_score", "TRADES, arXiv 1901.08573"),
    "energy": Entry("ebjdat.samplers.pgd:joint_energy_score", "arXiv 2505.19459: reverse SGLD, conditioned on y"),
    "marginal_energy": Entry("ebjdat.samplers.pgd:marginal_energy_score", "up E(x) alone"),
    "targeted_ce": Entry("ebjdat.samplers.pgd:targeted_score", "down the cross-entropy of class (y + 1) mod K"),
    "energy_ce": Entry("ebjdat.samplers.pgd:energy_ce_score", "CE - E: adaptive, keeps the energy low"),
    "squared": Entry("ebjdat.samplers.pgd:squared_score", "SCORE, arXiv 2202.10103: |p(x~) - p(x)|^2"),
    "kl_teacher": Entry("ebjdat.samplers.pgd:kl_teacher_score", "RSLAD, arXiv 2108.07969: KL(T(x) || p(x~))", reads=("teacher",)),
    "kl_disagree": Entry("ebjdat.samplers.pgd:kl_disagree_score", "AdaAD, Huang et al. 2023: KL(T(x~) || p(x~))", reads=("teacher",)),
    "random_sign": Entry("ebjdat.samplers.pgd:random_sign_score", "control: asks no network", reads=("generator",)),
    "released": Entry("ebjdat.samplers.pgd:released_score", RELEASE),
    "released_ce": Entry("ebjdat.samplers.pgd:released_ce_score", f"{RELEASE}, commented out"),
}

# How the adversary's eps and step depend on the image's class and on the epoch.
BUDGETS: Mapping[str, Entry] = {
    "uniform": Entry("ebjdat.samplers.budgets:uniform", "all alike"),
    "ramp": Entry("ebjdat.samplers.budgets:ramp", "as N-FGSM's on SVHN, de Jorge et al. 2022, arXiv 2202.01181", reads=("warmup",)),
    "robust_lt": Entry("ebjdat.samplers.budgets:robust_lt", "RobustLT, Zhang et al. 2026, arXiv 2605.13395", reads=("by_class", "warmup")),
    "robust_lt_permuted": Entry(
        "ebjdat.samplers.budgets:robust_lt_permuted", "control of robust_lt: its budgets, of other classes", reads=("by_class", "warmup")
    ),
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
    "cosine": Entry(
        "ebjdat.training.schedules:cosine",
        "Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts, after a warm-up",
        reads=("warmup",),
    ),
    "cosine_onecycle": Entry(
        "ebjdat.training.schedules:cosine_onecycle", "the same along cosines: torch's OneCycleLR; arXiv 2302.04638", reads=("peak",)
    ),
    "constant": Entry("ebjdat.training.schedules:constant", "linear warm-up, then constant", reads=("warmup",)),
}
