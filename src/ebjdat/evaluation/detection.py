"""Scores that distinguish images unlike a network's data from its own, and how well they do.

Every score is higher, the more an image is like those of the data.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ebjdat.evaluation.robust import batches
from ebjdat.intervals import CONFIDENCE
from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import frozen_parameters

Values = NDArray[np.float64]


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, batch_size: int) -> Values:
    """Logits (N, K) of images in [0, 1]."""
    return torch.cat([model(x[part]).double().cpu() for part in batches(len(x), batch_size)]).numpy()


def finite_rows(*logits: Values) -> NDArray[np.bool_]:
    """Which images (N,) have finite logits, in each of these (N, K). Of the others there is no confidence and no energy."""
    return np.logical_and.reduce([np.isfinite(each).all(1) for each in logits])


def logit_scores(logits: Values) -> dict[str, Values]:
    """Scores (N,) that logits (N, K) give.

    energy: -E(x) = logsumexp of the logits (Liu et al. 2020, arXiv 2010.03759).
    max_probability: of the softmax (Hendrycks & Gimpel 2017, arXiv 1610.02136).
    """
    mass = logsumexp(logits, axis=1)
    return {"energy": mass, "max_probability": np.exp(logits.max(1) - mass)}


def gradient_norm(model: nn.Module, x: Tensor, batch_size: int) -> Values:
    """-|d logsumexp f(x) / dx|_2 (N,) of images (N, C, H, W) in [0, 1]: JEM's approximate mass (arXiv 1912.03263, section 5.3.3)."""
    norms = []
    with frozen_parameters(model, "eval"), torch.enable_grad():
        for part in batches(len(x), batch_size):
            at = x[part].detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(marginal_energy(model(at)).sum(), at)
            norms.append(-gradient.flatten(1).double().norm(dim=1).cpu())
    return torch.cat(norms).numpy()


def auroc(inside: Values, outside: Values) -> float:
    """Chance that an image of the data scores above one that is not; ties count half."""
    truth = np.repeat([1, 0], [len(inside), len(outside)])
    return float(roc_auc_score(truth, np.concatenate([inside, outside])))


def auroc_interval(area: float, n_inside: int, n_outside: int) -> tuple[float, float]:
    """95 % score interval of an AUROC (Newcombe 2006, Statistics in Medicine 25, part 2, method 5).

    Every area whose distance to the estimate is within z standard errors of Hanley & McNeil (1982). Unlike the
    estimate +- z of them, it stays in [0, 1] and has a width at 0 and 1. Both samples count as independent; near 0 and 1 it
    covers rather more than 95 %.
    """
    # the variance of an area and of its complement are the same, and so is what lies below one and above the other
    return _lower_end(area, n_inside, n_outside), 1 - _lower_end(1 - area, n_inside, n_outside)


def _lower_end(area: float, n_inside: int, n_outside: int) -> float:
    z = norm.ppf((1 + CONFIDENCE) / 2)
    m = (n_inside + n_outside) / 2 - 1

    def excess(a: float) -> float:
        variance = a * (1 - a) * (1 + m * ((1 - a) / (2 - a) + a / (1 + a))) / (n_inside * n_outside)
        return (area - a) ** 2 - z**2 * variance

    # below 1, where the excess has a root of its own
    return float(brentq(excess, 0.0, min(area, 1 - 1e-9))) if area else 0.0


def separation(inside: Values, outside: Values, name: str) -> dict[str, float]:
    """AUROC as `name`, its interval as `name`_low and `name`_high; all nan where a score is not finite, since then there is no order."""
    if not (np.isfinite(inside).all() and np.isfinite(outside).all() and len(inside) and len(outside)):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    area = auroc(inside, outside)
    low, high = auroc_interval(area, len(inside), len(outside))
    return {name: area, f"{name}_low": low, f"{name}_high": high}
