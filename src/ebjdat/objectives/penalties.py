"""Losses with a penalty on derivatives, explanations, ranks or energies: pure functions (model, batch, samples, weights) -> Terms.

Those called "-style" are not confirmed: their papers' losses were not seen.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ebjdat.data.batches import Batch
from ebjdat.models.energy import joint_energy, marginal_energy
from ebjdat.models.modes import elementary_norms
from ebjdat.objectives.parts import (
    accuracy_of,
    adversarial_terms,
    cosines,
    cross_entropies,
    generation,
    input_gradient,
    smoothed,
    smoothed_mean,
    weighted_mean,
)
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.objectives.weighting import controlled
from ebjdat.settings import WeightSettings

AAT_MARGIN = 1.0  # in logits: images whose clean margins lie further apart than this are ranked


def matched_jacobian(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x) + delta |J(x) u|^2, u ~ N(0, S), S = mean d d' over the batch's d = x~ - x; its mean is CE(x) + delta tr(J S J').

    To first order the penalty of the matching principle, E |f(x) - f(x + u)|^2 (arXiv 2605.22800). J: of the logits, since their
    cross-entropy fixes their scale (an embedding, as there, can shrink while the next layer grows), in the mode of the pass, and so
    with batch norm's statistics. The published cosine warm-up of delta is left out.
    """
    return _with_jacobian(model, batch, weights, samples["nuisance"])


def jacobian_isotropic(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """The control of `matched_jacobian`: u has the same mean square length in directions that are all alike: S = s^2 1."""
    return _with_jacobian(model, batch, weights, samples["nuisance_isotropic"])


def jacobian_complement(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """The control of `jacobian_isotropic`: u of the same mean square length, orthogonal to every difference that S is made from."""
    return _with_jacobian(model, batch, weights, samples["nuisance_complement"])


def jacobian_shuffled(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """A control of `matched_jacobian`: S from differences to the neighbour of another image, with the same mean square length."""
    return _with_jacobian(model, batch, weights, samples["nuisance_shuffled"])


def _with_jacobian(model: nn.Module, batch: Batch, weights: WeightSettings, u: Tensor) -> Terms:
    logits, along = derivative_along(model, batch.x, u)
    square, ce = along.square().sum(1), cross_entropies(logits, batch.y)
    loss = weighted_mean(smoothed(logits, batch.y, weights) + weights.delta * square, logits, weights)
    logged = {"batch_clean_acc": accuracy_of(logits, batch.y), "jacobian": square.mean().detach()}
    return Terms(loss, ce.mean().detach(), logged, {"clean": marginal_energy(logits.detach()).mean()})


def derivative_along(model: nn.Module, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of x and their derivative along u (both (B, K)), in one pass (forward mode); both have gradients."""
    with warnings.catch_warnings(), elementary_norms(model), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)  # torch of its own use of torch.jit
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, u)))
    return dual.primal, dual.tangent


def egat_style(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x~) + delta (1 - cos(G(x), G(x~))), G = |input gradient of z_y|, a saliency ("EGAT-style", after arXiv 2603.01938).

    G(x) is a target without a gradient. An image whose G is 0 counts as aligned. Controls give targets to other images. Second-order
    terms can mask gradients: read the ensemble's figure, not PGD's alone.
    """
    clean, target = input_gradient(model, batch.x, batch.y, graph=False, of=joint_energy)
    adversarial, saliency = input_gradient(model, samples["adversarial"], batch.y, graph=True, of=joint_energy)
    aligned = cosines(controlled(target.abs(), weights.control), saliency.abs())
    ce = cross_entropies(adversarial, batch.y)
    loss = (smoothed(adversarial, batch.y, weights) + weights.delta * (1 - aligned)).mean()
    return adversarial_terms(loss, batch.y, clean, adversarial, ce_robust=ce.mean(), saliency=aligned.mean())


def half_at(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """(CE(x) + CE(x~)) / 2: clean and adversarial images count alike (Goodfellow et al. 2015, section 6, alpha 0.5)."""
    clean, adversarial = model(batch.x), model(samples["adversarial"])
    robust = cross_entropies(adversarial, batch.y)
    loss = weighted_mean((smoothed(clean, batch.y, weights) + smoothed(adversarial, batch.y, weights)) / 2, clean, weights)
    return adversarial_terms(loss, batch.y, clean, adversarial, ce_robust=robust.mean())


def aat_style(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x~) + delta mean of max(0, m/2 - (s(x~_i) - s(x_a))), over pairs of images with s(x_i) - s(x_a) > m ("AAT-style").

    s = z_y - max_{k != y} z_k, m = 1 logit. An image that leads a clean anchor x_a may not fall behind it when attacked; anchors have no
    gradient. After BiRQA's anchored adversarial training, which is of image quality. Controls give each anchor another's s.
    """
    clean, adversarial = model(batch.x).detach(), model(samples["adversarial"])
    before, after = leads(clean, batch.y), leads(adversarial, batch.y)
    pairs = (before[:, None] - before[None, :] > AAT_MARGIN).to(after.dtype)  # (image, anchor)
    hinge = (AAT_MARGIN / 2 - (after[:, None] - controlled(before, weights.control)[None, :])).relu()
    ranking = (pairs * hinge).sum() / pairs.sum().clamp_min(1.0)
    ce, loss = cross_entropies(adversarial, batch.y).mean(), smoothed_mean(adversarial, batch.y, weights) + weights.delta * ranking
    return adversarial_terms(loss, batch.y, clean, adversarial, ce_robust=ce, ranking=ranking)


def leads(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{k != y} z_k: (B,), positive where the class is right."""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return -joint_energy(logits, y) - others


def jeat_style(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """E(x~, y) - E(x-), which is w1 [E(x~) - E(x-)] + w3 CE(x~) at w1 = w3 = 1 ("JEAT-style", after arXiv 2108.09093).

    The density and the classifier of `jem`, learned from adversarial neighbours that ascended E(., y) alone; x-: chains.
    """
    return _of_neighbours(model, batch, samples["adversarial"], marginal_energy(model(samples["negatives"])), weights, "generated")


def jeat_no_chains(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """The control of `jeat_style` without its generative half: x- are images of the p(x) term (density_batch own: others than x)."""
    return _of_neighbours(model, batch, samples["adversarial"], marginal_energy(model(batch.x_density)), weights, "clean")


def _of_neighbours(model: nn.Module, batch: Batch, moved: Tensor, negative: Tensor, weights: WeightSettings, of: str) -> Terms:
    logits = model(moved)
    positive, ce = marginal_energy(logits), cross_entropies(logits, batch.y).mean()
    logged = {"ce_robust": ce.detach(), "batch_robust_acc": accuracy_of(logits, batch.y)}
    energies = {"adversarial": positive.mean().detach(), of: negative.mean().detach()}
    return Terms(generation(positive, negative, weights) + weights.w3 * ce, logged=logged, energies=energies)


def jeat_noise(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """The control of `jeat_style` without its attack: a random corner of the ball instead of the adversarial neighbour."""
    terms = _of_neighbours(model, batch, samples["corner"], marginal_energy(model(samples["negatives"])), weights, "generated")
    logged = {"batch_corner_acc": terms.logged["batch_robust_acc"]}
    energies = {"corner": terms.energies["adversarial"], "generated": terms.energies["generated"]}
    return Terms(terms.loss, logged=logged, energies=energies)
