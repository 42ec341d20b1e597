"""Losses of the methods: pure functions (model, batch, samples, weights) -> Terms. Each term is written once."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.models.energy import marginal_energy
from ebjdat.models.logits import predicted
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.settings import WeightSettings


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (predicted(logits.detach()) == y).float().mean()


def _classified(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), their cross-entropy and their accuracy."""
    logits = model(x)
    return logits, F.cross_entropy(logits, y), _accuracy(logits, y)


def _generation(
    model: nn.Module, batch: Batch, clean_logits: Tensor, negatives: Tensor, weights: WeightSettings
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """w1 (mean E(x+) - mean E(x-)), whose gradient is that of -w1 log p(x) (arXiv 1912.03263), and the energies' L2 penalty.

    The penalty is energy_l2 (mean E(x+)^2 + mean E(x-)^2) (Du & Mordatch 2019, arXiv 1903.08689). Also returns mean E(x+) and
    the detached mean energies.
    """
    positive = marginal_energy(clean_logits if batch.x_density is batch.x else model(batch.x_density))
    negative = marginal_energy(model(negatives))
    term = weights.w1 * (positive.mean() - negative.mean())
    if weights.energy_l2:
        term = term + weights.energy_l2 * (positive.square().mean() + negative.square().mean())
    return term, positive.mean(), {"clean": positive.detach().mean(), "generated": negative.detach().mean()}


def classifier(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on clean images."""
    logits, ce, accuracy = _classified(model, batch.x, batch.y)
    return Terms(ce, ce.detach(), {"batch_clean_acc": accuracy}, {"clean": marginal_energy(logits.detach()).mean()})


def pgd_at(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy on adversarial images only (Madry et al. 2018, eq. 2.1)."""
    logits, ce, accuracy = _classified(model, samples["adversarial"], batch.y)
    logged = {"ce_robust": ce.detach(), "batch_robust_acc": accuracy}
    return Terms(ce, logged=logged, energies={"adversarial": marginal_energy(logits.detach()).mean()})


def trades(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """CE(x) + beta KL(p(.|x) || p(.|x~)) (Zhang et al. 2019, eq. 5); gradients flow through both."""
    logits, ce, accuracy = _classified(model, batch.x, batch.y)
    adversarial_logits = model(samples["adversarial"])
    kl = F.kl_div(adversarial_logits.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    return Terms(
        ce + weights.beta * kl,
        ce.detach(),
        {"batch_clean_acc": accuracy, "kl": kl.detach(), "batch_robust_acc": _accuracy(adversarial_logits, batch.y)},
        {
            "clean": marginal_energy(logits.detach()).mean(),
            "adversarial": marginal_energy(adversarial_logits.detach()).mean(),
        },
    )


def jem(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """-log p(x) - log p(y|x) (arXiv 1912.03263); JEM, JEM++ and SADA-JEM differ in sampler, start, update and data."""
    logits, ce, accuracy = _classified(model, batch.x, batch.y)
    generation, _, energies = _generation(model, batch, logits, samples["negatives"], weights)
    return Terms(generation + weights.w3 * ce, ce.detach(), {"batch_clean_acc": accuracy}, energies)


def eb_jdat(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """EB-JDAT (arXiv 2505.19459): minimise -(w1 h1 + w2 h2 + w3 h3).

    h1: log p(x), by chains. h2: log p(x~|x): it pulls the energy of adversarial neighbours, which ascended it, down to that
    of their clean images: mean E(x~) - mean E(x). h3: log p(y|x, x~), cross-entropy on both. The released code uses w2 = -0.1,
    which pushes E(x~) up instead, its own neighbours, and mean E(x+), which is of other images, in place of mean E(x) (`align`).
    """
    logits, ce, accuracy = _classified(model, batch.x, batch.y)
    adversarial_logits, robust_ce, robust_accuracy = _classified(model, samples["adversarial"], batch.y)
    generation, density_energy, energies = _generation(model, batch, logits, samples["negatives"], weights)
    energy_adversarial = marginal_energy(adversarial_logits).mean()
    alignment = energy_adversarial - (density_energy if weights.align == "density" else marginal_energy(logits).mean())
    return Terms(
        generation + weights.w2 * alignment + weights.w3 * (ce + robust_ce),
        ce.detach(),
        {"batch_clean_acc": accuracy, "ce_robust": robust_ce.detach(), "batch_robust_acc": robust_accuracy},
        {**energies, "adversarial": energy_adversarial.detach()},
    )
