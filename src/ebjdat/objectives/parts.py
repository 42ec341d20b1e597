"""What losses share: cross-entropies, divergences, means over weighted examples, what adversarial trainings log."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat import registry
from ebjdat.models.energy import marginal_energy
from ebjdat.models.logits import predicted
from ebjdat.objectives.terms import Terms
from ebjdat.objectives.weighting import controlled
from ebjdat.settings import WeightSettings


def accuracy_of(logits: Tensor, y: Tensor) -> Tensor:
    return (predicted(logits.detach()) == y).float().mean()


def classified(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), their cross-entropy and their accuracy."""
    logits = model(x)
    return logits, F.cross_entropy(logits, y), accuracy_of(logits, y)


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example: (B,), in nats."""
    return F.cross_entropy(logits, y, reduction="none")


def smoothed(logits: Tensor, y: Tensor, weights: WeightSettings) -> Tensor:
    """Cross-entropy of each example (B,) from labels smoothed by s, which is minimised: (1 - s) CE + s mean_k(-log p_k)."""
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=weights.smoothing)


def smoothed_mean(logits: Tensor, y: Tensor, weights: WeightSettings) -> Tensor:
    """The mean of `smoothed`."""
    return F.cross_entropy(logits, y, label_smoothing=weights.smoothing)


def divergences(of: Tensor, from_: Tensor) -> Tensor:
    """KL(softmax(of) || softmax(from_)) for each example: (B,), in nats; gradients flow through both."""
    return F.kl_div(from_.log_softmax(1), of.log_softmax(1), reduction="none", log_target=True).sum(1)


def weighted_mean(losses: Tensor, logits: Tensor, weights: WeightSettings) -> Tensor:
    """Mean of losses (B,), each example weighted as the settings say; `logits` are those of its clean image where the method sees it."""
    weigh = registry.load(registry.WEIGHTINGS, weights.examples.name)
    return (controlled(weigh(losses.detach(), logits.detach(), weights.examples), weights.control) * losses).mean()


def adversarial_terms(loss: Tensor, y: Tensor, clean: Tensor | None, adversarial: Tensor, **logged: Tensor) -> Terms:
    """A loss with what adversarial trainings log of it, from logits (B, K); clean: None where the method does not see clean images."""
    of_clean = {} if clean is None else {"batch_clean_acc": accuracy_of(clean, y)}
    energies = {} if clean is None else {"clean": marginal_energy(clean.detach()).mean()}
    return Terms(
        loss,
        None if clean is None else F.cross_entropy(clean.detach(), y),
        {**of_clean, **{name: value.detach() for name, value in logged.items()}, "batch_robust_acc": accuracy_of(adversarial, y)},
        {**energies, "adversarial": marginal_energy(adversarial.detach()).mean()},
    )


def generation(positive: Tensor, negative: Tensor, weights: WeightSettings) -> Tensor:
    """w1 (mean E(x+) - mean E(x-)) from the energies of both (any number each), whose gradient is that of -w1 log p(x).

    Beside it the energies' L2 penalty, energy_l2 (mean E(x+)^2 + mean E(x-)^2) (Du & Mordatch 2019, arXiv 1903.08689).
    """
    term = weights.w1 * (positive.mean() - negative.mean())
    if weights.energy_l2:
        term = term + weights.energy_l2 * (positive.square().mean() + negative.square().mean())
    return term


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, graph: bool, of: Callable[[Tensor, Tensor], Tensor] = cross_entropies
) -> tuple[Tensor, Tensor]:
    """Logits (B, K), and the gradient of each image's `of` (logits, labels) -> (B,), by its pixels (B, C H W).

    graph: both can be differentiated; otherwise neither.
    """
    x = x.detach().requires_grad_(True)
    logits = model(x)
    (gradient,) = torch.autograd.grad(of(logits, y).sum(), x, create_graph=graph)
    return (logits if graph else logits.detach()), gradient.flatten(1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each two rows of (B, D): (B,); 1 where one of them is 0, without a gradient."""
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp_min(1e-30), 1.0)
