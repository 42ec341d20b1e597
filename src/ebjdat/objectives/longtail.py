"""Losses for long-tailed training splits: pure functions (model, batch, samples, weights) -> Terms."""

from __future__ import annotations

from torch import nn

from ebjdat.data.batches import Batch
from ebjdat.objectives.parts import adversarial_terms, cross_entropies, smoothed, weighted_mean
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.settings import WeightSettings


def at_bsl(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE of z(x~) + log n_c, n_c the training images of class c (AT-BSL, Yue et al. 2024, with the balanced softmax of Ren et al. 2020).

    The shift belongs to the loss alone: the adversary and every evaluation see the logits z. Where all classes are as large, it is CE.
    """
    logits = model(samples["adversarial"])
    shifted = logits + samples["log_counts"]
    loss = weighted_mean(smoothed(shifted, batch.y, weights), logits, weights)
    logged = {"ce_robust": cross_entropies(logits, batch.y).mean(), "ce_balanced": cross_entropies(shifted, batch.y).mean()}
    return adversarial_terms(loss, batch.y, None, logits, **logged)
