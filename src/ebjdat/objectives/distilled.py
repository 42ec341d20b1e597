"""Losses of adversarial distillation: a frozen teacher T, which the settings name (`training.teacher`), instead of labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebjdat.data.batches import Batch
from ebjdat.objectives.parts import adversarial_terms, cross_entropies, divergences
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.settings import WeightSettings


def ard(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """taught t^2 KL(T(x)^t || p(.|x~)^t) + (1 - taught) CE(x), ^t: logits divided by the temperature t (ARD, arXiv 1905.09747).

    KL is the sum over classes (the authors' code has the mean, which is K times smaller).
    """
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    target, t = taught(samples["taught"], batch.y, weights), weights.temperature
    kl = t**2 * divergences(target / t, adversarial / t)
    loss = weights.taught * kl + (1 - weights.taught) * cross_entropies(clean, batch.y)
    return adversarial_terms(loss.mean(), batch.y, clean, adversarial, kl_teacher=kl.mean())


def rslad(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """taught KL(T(x) || p(.|x~)) + (1 - taught) KL(T(x) || p(.|x)) (RSLAD, arXiv 2108.07969; published 5/6)."""
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    target = taught(samples["taught"], batch.y, weights)
    kl = divergences(target, adversarial)
    loss = weights.taught * kl + (1 - weights.taught) * divergences(target, clean)
    return adversarial_terms(loss.mean(), batch.y, clean, adversarial, kl_teacher=kl.mean())


def iad(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """KL(T(x) || p(.|x~)) + (1 - w) KL(p(.|x) || p(.|x~)), w = T_y(x~)^trust the teacher's reliability (IAD-I, Zhu et al. 2022).

    In the first epochs (`alone` of them all) w is 1. Gradients flow through the guide p(.|x), too, as in the authors' code.
    """
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    kl = divergences(taught(samples["taught"], batch.y, weights), adversarial)
    loss = kl + (1 - samples["trust"]) * divergences(clean, adversarial)
    logged = {"kl_teacher": kl.mean(), "trust": samples["trust"].mean()}
    return adversarial_terms(loss.mean(), batch.y, clean, adversarial, **logged)


def adaad(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """KL(T(x~) || p(.|x~)), x~ where the two disagree (AdaAD, Huang et al. 2023)."""
    adversarial = model(samples["adversarial"])
    kl = divergences(taught(samples["taught_adversarial"], batch.y, weights), adversarial)
    return adversarial_terms(kl.mean(), batch.y, None, adversarial, kl_teacher=kl.mean())


def taught(logits: Tensor, y: Tensor, weights: WeightSettings) -> Tensor:
    """The teacher's logits (B, K), or those of its controls.

    shuffled: those of the next image of the batch, with the two labels' classes exchanged: as sure of the label, but what it says of
    the other classes is of another image. mean_matched: as sure of the label as the teacher is on average, and of all other classes
    alike, which is label smoothing.
    """
    if weights.control == "none":
        return logits
    if weights.control == "shuffled":
        of_next, own, other = logits.roll(1, 0), y[:, None], y.roll(1, 0)[:, None]
        return of_next.scatter(1, own, of_next.gather(1, other)).scatter(1, other, of_next.gather(1, own))
    classes = logits.shape[1]
    sure = logits.softmax(1).gather(1, y[:, None]).mean().clamp(1e-6, 1 - 1e-6)
    return torch.full_like(logits, 1.0).mul(((1 - sure) / (classes - 1)).log()).scatter(1, y[:, None], sure.log().expand(len(y), 1))
