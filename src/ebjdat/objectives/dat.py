"""DAT, dual adversarial training (arXiv 2510.13872), second stage: its loss, its samples x-, and how far these climb."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat import registry
from ebjdat.data.batches import Batch
from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.parts import adversarial_terms, cross_entropies
from ebjdat.objectives.sampling import SamplingState
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.pixels import INTERNAL, UNIT, internal_distance, internal_from_unit, unit_from_internal
from ebjdat.samplers.pgd import projected_gradient, unit_vectors
from ebjdat.settings import ContrastSettings, TrainingSettings, WeightSettings


def dat(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """w1 [mean of -log s(x) and -log(1 - s(x-))] + w3 CE(x~), s = sigmoid(-E) (DAT's second stage, arXiv 2510.13872).

    x- climb -E, from images out of distribution; published: those of another data set, here made from the images themselves. The
    first stage is `pgd_at` with L2 neighbours, as a pretraining; batch norm stays as that left it (`mode: eval`). Averaged weights
    (`ema: 0.999`) are published, too.
    """
    adversarial = model(samples["adversarial"])
    data, contrast = (-marginal_energy(model(x)) for x in (batch.x_density, samples["contrast"]))
    is_data = torch.cat([torch.ones_like(data), torch.zeros_like(contrast)])
    bce = F.binary_cross_entropy_with_logits(torch.cat([data, contrast]), is_data)
    ce = cross_entropies(adversarial, batch.y).mean()
    auc = area_under_curve(data.detach(), contrast.detach())
    terms = adversarial_terms(weights.w1 * bce + weights.w3 * ce, batch.y, None, adversarial, ce_robust=ce, bce_data=bce, auc=auc)
    return replace(terms, energies={"clean": -data.detach().mean(), "contrast": -contrast.detach().mean(), **terms.energies})


def area_under_curve(higher: Tensor, lower: Tensor) -> Tensor:
    """Share of pairs of scores (M,), (N,) of which the first is higher; a tie counts half: the area under the ROC curve."""
    difference = higher[:, None] - lower
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean()


def contrast(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """x-: images out of distribution, made from batch.x_density and moved up the logsumexp: (D, C, H, W) in [-1, 1].

    Each step is as long as the settings say, within no ball. direction "random": as far in all, in a random direction.
    """
    spec, growth = state.settings.contrast, state.own
    assert isinstance(growth, Growth)
    images = unit_from_internal(batch.x_density).clamp(*UNIT)
    start: Tensor = internal_from_unit(registry.load(registry.MADE_SETS, spec.ood)(images, generator))
    with frozen_parameters(model, "eval"):
        moved = projected_gradient(
            lambda x: -marginal_energy(model(x)),
            start,
            eps=0.0,  # of no ball
            step_size=internal_distance(spec.step_size),
            steps=growth.steps,
            norm=spec.norm,
            bounds=INTERNAL,
            start=start,
            into_ball=False,
        )
    if spec.direction == "random":
        length = (moved - start).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        direction = unit_vectors(torch.randn(start.shape, generator=generator, device=start.device))
        moved = (start + length * direction).clamp(*INTERNAL)
    return moved


class Growth:
    """How many steps x- climb: from 0, one more whenever the network tells x- from data too well.

    That is where the area under the ROC curve, its mean over the last `every` steps, reaches the threshold. It is read from the
    device then alone.
    """

    def __init__(self, settings: ContrastSettings, device: torch.device) -> None:
        self.settings = settings
        self.steps = 0
        self.total = torch.zeros((), device=device)  # of areas since the last decision

    def after(
        self, model: WideResNet, batch: Batch, samples: Samples, terms: Terms, index: int, noise: torch.Generator
    ) -> Mapping[str, Tensor]:
        climbed = torch.full_like(self.total, float(self.steps))
        self.total = self.total + terms.logged["auc"]
        if (index + 1) % self.settings.every == 0:
            if float(self.total) / self.settings.every >= self.settings.threshold:
                self.steps = min(self.steps + 1, self.settings.most)
            self.total = torch.zeros_like(self.total)
        return {"contrast_steps": climbed}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.total = int(state["steps"]), state["total"].to(self.total)


def growth(model: WideResNet, settings: TrainingSettings, seed: int) -> Growth:
    return Growth(settings.contrast, next(model.parameters()).device)
