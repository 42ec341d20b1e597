"""Losses of the methods: pure functions (model, batch, samples, weights) -> terms.

"loss" is what is minimised; the other entries are detached and for the eye: cross-entropies, batch accuracies, mean
energies. Each term is written once.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.models.energy import marginal_energy
from ebjdat.models.logits import predicted
from ebjdat.settings import WeightSettings

Samples = Mapping[str, Tensor]
Terms = dict[str, Tensor]


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (predicted(logits) == y).float().mean()


def _classified(model: nn.Module, x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor, Terms]:
    """Logits, cross-entropy, and what is logged of them under `name` ("clean" or "robust")."""
    logits = model(x)
    ce = F.cross_entropy(logits, y)
    return logits, ce, {f"ce_{name}": ce.detach(), f"batch_{name}_acc": _accuracy(logits.detach(), y)}


def _generation(
    model: nn.Module, batch: Batch, clean_logits: Tensor, negatives: Tensor, weights: WeightSettings
) -> tuple[Tensor, Tensor, Terms]:
    """w1 (mean E(x+) - mean E(x-)), whose gradient is that of -w1 log p(x) (arXiv 1912.03263), and the energies' L2 penalty.

    The penalty is energy_l2 (mean E(x+)^2 + mean E(x-)^2) (Du & Mordatch 2019, arXiv 1903.08689). Returned with mean E(x+).
    """
    positive = marginal_energy(clean_logits if batch.x_density is batch.x else model(batch.x_density))
    negative = marginal_energy(model(negatives))
    term = weights.w1 * (positive.mean() - negative.mean())
    if weights.energy_l2:
        term = term + weights.energy_l2 * (positive.square().mean() + negative.square().mean())
    return term, positive.mean(), {"energy_clean": positive.detach().mean(), "energy_generated": negative.detach().mean()}


def classifier(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on clean images."""
    logits, ce, logged = _classified(model, batch.x, batch.y, "clean")
    return {"loss": ce, **logged, "energy_clean": marginal_energy(logits.detach()).mean()}


def pgd_at(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on adversarial images only (Madry et al. 2018, eq. 2.1)."""
    logits, ce, logged = _classified(model, samples["adversarial"], batch.y, "robust")
    return {"loss": ce, **logged, "energy_adversarial": marginal_energy(logits.detach()).mean()}


def trades(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x) + beta KL(p(.|x) || p(.|x~)) (Zhang et al. 2019, eq. 5); gradients flow through both."""
    logits, ce, logged = _classified(model, batch.x, batch.y, "clean")
    adversarial_logits = model(samples["adversarial"])
    kl = F.kl_div(adversarial_logits.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    return {
        "loss": ce + weights.beta * kl,
        **logged,
        "kl": kl.detach(),
        "batch_robust_acc": _accuracy(adversarial_logits.detach(), batch.y),
        "energy_clean": marginal_energy(logits.detach()).mean(),
        "energy_adversarial": marginal_energy(adversarial_logits.detach()).mean(),
    }


def jem(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """-log p(x) - log p(y|x) (arXiv 1912.03263); JEM, JEM++ and SADA-JEM differ in sampler, start, update and data."""
    logits, ce, logged = _classified(model, batch.x, batch.y, "clean")
    generation, _, energies = _generation(model, batch, logits, samples["negatives"], weights)
    return {"loss": generation + weights.w3 * ce, **logged, **energies}


def eb_jdat(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """EB-JDAT (arXiv 2505.19459): minimise -(w1 h1 + w2 h2 + w3 h3).

    h1: log p(x), by chains. h2: log p(x~|x), by pulling the energy of adversarial neighbours, which were walked up, down
    to that of their clean images: mean E(x~) - mean E(x). h3: log p(y|x, x~), cross-entropy on both. The released code's
    form is this one with w2 = -0.1, which pushes E(x~) up instead, with its own neighbours, and with mean E(x+) for mean E(x)
    (`align`), whose images are others.
    """
    logits, ce, logged = _classified(model, batch.x, batch.y, "clean")
    adversarial_logits, ce_adversarial, logged_adversarial = _classified(model, samples["adversarial"], batch.y, "robust")
    generation, density_energy, energies = _generation(model, batch, logits, samples["negatives"], weights)
    energy_adversarial = marginal_energy(adversarial_logits).mean()
    alignment = energy_adversarial - (density_energy if weights.align == "density" else marginal_energy(logits).mean())
    return {
        "loss": generation + weights.w2 * alignment + weights.w3 * (ce + ce_adversarial),
        **logged,
        **logged_adversarial,
        **energies,
        "energy_adversarial": energy_adversarial.detach(),
    }
