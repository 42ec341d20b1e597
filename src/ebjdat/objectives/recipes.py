"""Losses of the methods: pure functions (model, batch, samples, weights) -> Terms. Each term is written once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ebjdat.data.batches import Batch
from ebjdat.models.energy import marginal_energy
from ebjdat.objectives.parts import (
    adversarial_terms,
    classified,
    cosines,
    cross_entropies,
    divergences,
    generation,
    input_gradient,
    smoothed,
    smoothed_mean,
    weighted_mean,
)
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.objectives.weighting import controlled
from ebjdat.settings import WeightSettings

MART_GUARD = 1.0001  # within MART's logarithm, in its authors' code
S2O_CLASS, S2O_OTHERS = 0.2, 0.8  # shares of S2O's targets: the class itself, all others together


def _generation(
    model: nn.Module, batch: Batch, clean_logits: Tensor, negatives: Tensor, weights: WeightSettings
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The p(x) term of images and chains with its L2 penalty (parts.generation), mean E(x+), and the detached mean energies."""
    positive = marginal_energy(clean_logits if batch.x_density is batch.x else model(batch.x_density))
    negative = marginal_energy(model(negatives))
    return (
        generation(positive, negative, weights),
        positive.mean(),
        {"clean": positive.detach().mean(), "generated": negative.detach().mean()},
    )


def classifier(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on clean images."""
    logits, ce, accuracy = classified(model, batch.x, batch.y)
    energies = {"clean": marginal_energy(logits.detach()).mean()}
    return Terms(smoothed_mean(logits, batch.y, weights), ce.detach(), {"batch_clean_acc": accuracy}, energies)


def pgd_at(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on adversarial images only (Madry et al. 2018, eq. 2.1)."""
    logits = model(samples["adversarial"])
    loss = weighted_mean(smoothed(logits, batch.y, weights), logits, weights)
    return adversarial_terms(loss, batch.y, None, logits, ce_robust=cross_entropies(logits, batch.y).mean())


def corners(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on random corners of the ball: the control of adversarial training with one step, as far and without a gradient."""
    logits, _, accuracy = classified(model, samples["corner"], batch.y)
    return Terms(
        smoothed_mean(logits, batch.y, weights),
        logged={"batch_corner_acc": accuracy},
        energies={"corner": marginal_energy(logits.detach()).mean()},
    )


def trades(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x) + beta KL(p(.|x) || p(.|x~)) (Zhang et al. 2019, eq. 5); gradients flow through both."""
    return _with_divergence(model, batch, samples, weights, lambda clean, adversarial, y: smoothed(clean, y, weights))


def weat_adv(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x~) + beta KL(p(.|x) || p(.|x~)), weighted by energy (WEAT, Mirza et al. 2024); its other variant has TRADES's CE(x)."""
    return _with_divergence(model, batch, samples, weights, lambda clean, adversarial, y: smoothed(adversarial, y, weights))


def _with_divergence(
    model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings, first: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Terms:
    """Mean of a loss of (clean logits, adversarial logits, labels) -> (B,), and beta KL(p(.|x) || p(.|x~))."""
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    kl = divergences(clean, adversarial)
    loss = weighted_mean(first(clean, adversarial, batch.y) + weights.beta * kl, clean, weights)
    return adversarial_terms(loss, batch.y, clean, adversarial, kl=kl.mean())


def mart(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """BCE(x~) + beta (1 - p_y(x)) KL(p(.|x) || p(.|x~)) (MART, Wang et al. 2020, eq. 11); the weight has a gradient, too.

    BCE: -log p_y(x~) - log(1 - max_{k != y} p_k(x~)). Controls give the weights of the KL term to other examples.
    """
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    others = adversarial.softmax(1).scatter(1, batch.y[:, None], 0.0).amax(1)
    bce = cross_entropies(adversarial, batch.y) - (MART_GUARD - others).log()
    missed = 1 - clean.softmax(1).gather(1, batch.y[:, None])[:, 0]
    kl = divergences(clean, adversarial)
    loss = (bce + weights.beta * controlled(missed, weights.control) * kl).mean()
    return adversarial_terms(loss, batch.y, clean, adversarial, kl=kl.mean(), bce=bce.mean())


def der(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x~) + delta mean |E(x) - E(x~)| ("DER-style", after arXiv 2505.22486, whose form and strength were not seen)."""
    return _with_energy_change(model, batch, samples, weights, samples["adversarial"])


def der_random(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """The control of `der`: the energy change at a random corner of the ball instead of the adversarial neighbour."""
    return _with_energy_change(model, batch, samples, weights, samples["corner"])


def _with_energy_change(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings, moved: Tensor) -> Terms:
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    energy = marginal_energy(adversarial if moved is samples["adversarial"] else model(moved))
    change = (marginal_energy(clean) - energy).abs()
    ce = cross_entropies(adversarial, batch.y)
    loss = weighted_mean(smoothed(adversarial, batch.y, weights) + weights.delta * change, clean, weights)
    return adversarial_terms(loss, batch.y, clean, adversarial, ce_robust=ce.mean(), energy_change=change.mean())


def gradalign(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x~) + delta (1 - cos(g(x), g(x + u))), g the input gradient of the cross-entropy (Andriushchenko & Flammarion 2020).

    u is uniform in the ball. Gradients flow through g(x + u) alone; an image without a gradient counts as aligned (arXiv 2007.02617).
    """
    adversarial = model(samples["adversarial"])
    ce = cross_entropies(adversarial, batch.y)
    (_, fixed), (_, other) = (input_gradient(model, x, batch.y, graph) for x, graph in ((batch.x, False), (samples["uniform"], True)))
    aligned = cosines(fixed, other)
    loss = weighted_mean(smoothed(adversarial, batch.y, weights) + weights.delta * (1 - aligned), adversarial, weights)
    return adversarial_terms(loss, batch.y, None, adversarial, ce_robust=ce.mean(), alignment=aligned.mean())


def s2o(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """(1 - 2 t) CE(x~) + t [KL(q || p(.|x)) + KL(q~ || p(.|x~))] (S2O on PGD-AT, arXiv 2203.06020; t = `targets`, published 0.05)."""
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    second = _second_order(clean, batch.y, weights) + _second_order(adversarial, batch.y, weights)
    ce = cross_entropies(adversarial, batch.y)
    loss = weighted_mean((1 - 2 * weights.targets) * ce + weights.targets * second, clean, weights)
    return adversarial_terms(loss, batch.y, clean, adversarial, ce_robust=ce.mean(), second_order=second.mean())


def s2o_trades(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """(1 - 2 t) CE(x) + t [the same two] + beta KL(p(.|x) || p(.|x~)) (S2O on TRADES; published t 0.15)."""

    def first(clean: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        second = _second_order(clean, y, weights) + _second_order(adversarial, y, weights)
        return (1 - 2 * weights.targets) * cross_entropies(clean, y) + weights.targets * second

    return _with_divergence(model, batch, samples, weights, first)


def _second_order(logits: Tensor, y: Tensor, weights: WeightSettings) -> Tensor:
    """KL(q || softmax(logits)) for each example (B,), q the row of its class in `second_order_targets`."""
    q = controlled(second_order_targets(logits.detach()), weights.control)[y]
    return (torch.xlogy(q, q) - q * logits.log_softmax(1)).sum(1)


def second_order_targets(logits: Tensor) -> Tensor:
    """S2O's targets (K, K) from a batch's logits (B, K): each row is a distribution with 0.2 on its own class.

    With A = sum z z', the other classes share 0.8 in proportion to max_k |A_ik| - |A_ij|; equally, where all these are 0.
    """
    second = (logits.T @ logits).abs()
    off = 1 - torch.eye(len(second), dtype=second.dtype, device=second.device)
    apart = (second.amax(1, keepdim=True) - second) * off
    total = apart.sum(1, keepdim=True)
    shares = torch.where(total > 0, apart / total.clamp_min(torch.finfo(total.dtype).tiny), off / off.sum(1, keepdim=True))
    return S2O_OTHERS * shares + S2O_CLASS * (1 - off)


def jem(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """-log p(x) - log p(y|x) (arXiv 1912.03263); JEM, JEM++ and SADA-JEM differ in sampler, start, update and data."""
    logits, ce, accuracy = classified(model, batch.x, batch.y)
    term, _, energies = _generation(model, batch, logits, samples["negatives"], weights)
    loss = term + weights.w3 * smoothed_mean(logits, batch.y, weights)
    return Terms(loss, ce.detach(), {"batch_clean_acc": accuracy}, energies)


def eb_jdat(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """EB-JDAT (arXiv 2505.19459): minimise -(w1 h1 + w2 h2 + w3 h3).

    h1: log p(x), by chains. h2: log p(x~|x): it pulls the energy of adversarial neighbours, which ascended it, down to that
    of their clean images: mean E(x~) - mean E(x). h3: log p(y|x, x~), cross-entropy on both. The released code uses w2 = -0.1,
    which pushes E(x~) up instead, its own neighbours, and mean E(x+), which is of other images, in place of mean E(x) (`align`).
    """
    logits, ce, accuracy = classified(model, batch.x, batch.y)
    adversarial_logits, robust_ce, robust_accuracy = classified(model, samples["adversarial"], batch.y)
    term, density_energy, energies = _generation(model, batch, logits, samples["negatives"], weights)
    energy_adversarial = marginal_energy(adversarial_logits).mean()
    alignment = energy_adversarial - (density_energy if weights.align == "density" else marginal_energy(logits).mean())
    labelled = smoothed_mean(logits, batch.y, weights) + smoothed_mean(adversarial_logits, batch.y, weights)
    return Terms(
        term + weights.w2 * alignment + weights.w3 * labelled,
        ce.detach(),
        {"batch_clean_acc": accuracy, "ce_robust": robust_ce.detach(), "batch_robust_acc": robust_accuracy},
        {**energies, "adversarial": energy_adversarial.detach()},
    )
