"""When a training has diverged, and what changes before it continues.

`vitals` measures one step, `symptoms` says what is wrong with it, `adjusted` gives the settings after some rungs of the
ladder. All three are pure; the loop goes back to the last healthy state and calls them. The family's authors do the same by
hand: restart from a checkpoint with another seed, a lower rate, more chain steps, or a small penalty on the energies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.data.batches import Batch
from ebjdat.models.energy import marginal_energy
from ebjdat.objectives.terms import Terms
from ebjdat.pixels import INTERNAL
from ebjdat.registry import Method
from ebjdat.settings import HealingSettings, Rung, TrainingSettings, merge

AT_END = 1e-3  # a pixel this near to an end of the range, or beyond it, counts as saturated


@dataclass(frozen=True)
class Event:
    """A divergence: where a check found it, by what, and what was done.

    epoch, step: counted from 1, of the training as it then was. healed: whether training went back to a healthy state and
    continued with a change.
    """

    epoch: int
    step: int
    symptoms: tuple[str, ...]
    action: str
    healed: bool

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}: {'; '.join(self.symptoms)}; {self.action}"


class Diverged(Exception):  # noqa: N818 (not an error: the loop heals it)
    """A check found symptoms that training must not continue with."""

    def __init__(self, step: int, symptoms: tuple[str, ...]) -> None:
        super().__init__("; ".join(symptoms))
        self.step = step
        self.symptoms = symptoms


def vitals(terms: Terms, sums: Mapping[str, Tensor], batch: Batch, chains: Tensor | None, after: Tensor) -> dict[str, float]:
    """Measurements of one step, read from the device at once. Keys are named as HealingSettings' bounds.

    terms: of this step. sums: of the epoch so far, in which a NaN or infinity of any step stays visible. chains: this
    step's samples from the replay buffer (B, C, H, W), None for methods without. after: logits of batch.x (B, K) after the
    update, so that no state is kept whose weights just broke.
    """
    later = marginal_energy(after).mean()
    clean = terms.energies.get("clean")
    all_values = [*sums.values(), later, *([] if chains is None else [chains.sum()])]
    measured = {
        "finite": torch.stack([torch.isfinite(value) for value in all_values]).all().float(),
        "energy": torch.stack([*terms.energies.values(), later]).abs().max(),
    }
    gaps = [value - clean for of, value in terms.energies.items() if clean is not None and of != "clean"]
    if gaps:
        measured["gap"] = torch.stack(gaps).abs().max()
    clean_ce = [] if terms.clean_ce is None else [terms.clean_ce]
    measured["cross_entropy"] = torch.stack([*clean_ce, F.cross_entropy(after, batch.y)]).max() / math.log(after.shape[1])
    if chains is not None:
        images = batch.x_density
        of_chains, of_images = _at_ends(chains), _at_ends(batch.x)
        measured["saturation"] = ((of_chains - of_images) / (1 - of_images).clamp_min(1e-6)).clamp_min(0)
        measured["contrast"] = chains.flatten(1).std(1).mean() / images.flatten(1).std(1).mean().clamp_min(1e-6)
        measured["diversity"] = chains.std(0).mean() / images.std(0).mean().clamp_min(1e-6)
    return dict(zip(measured, torch.stack([value.detach().float() for value in measured.values()]).tolist(), strict=True))


def _at_ends(x: Tensor) -> Tensor:
    return ((x <= INTERNAL[0] + AT_END) | (x >= INTERNAL[1] - AT_END)).float().mean()


HIGHEST = {
    "energy": "an energy of {value:.4g}, beyond {bound:.4g}",
    "gap": "an energy gap of {value:.4g}, beyond {bound:.4g}",
    "cross_entropy": "a cross-entropy of {value:.3g} times that of a guess, beyond {bound:.3g}",
    "overfitting": "catastrophic overfitting (PGD accuracy on training images is {value:.0%} of them below its best, beyond {bound:.0%})",
    "saturation": "saturated chains ({value:.0%} of the pixels that images leave free lie at an end of the range, beyond {bound:.0%})",
}
LOWEST = {
    "contrast": "constant chains (spread within a chain {value:.2g} of an image's, below {bound:.2g})",
    "diversity": "a collapsed buffer (spread across chains {value:.2g} of images', below {bound:.2g})",
}


def symptoms(measured: Mapping[str, float], settings: HealingSettings) -> tuple[str, ...]:
    """What is wrong, in words; empty when healthy. A value that is not finite exceeds every bound."""
    if not measured["finite"]:
        return ("values that are not finite",)
    wrong = []
    for name, text in (*HIGHEST.items(), *LOWEST.items()):
        if name in measured:
            value, bound = measured[name], getattr(settings, name)
            if not (value <= bound if name in HIGHEST else value >= bound):
                wrong.append(text.format(value=value, bound=bound))
    return tuple(wrong)


def usable(ladder: Sequence[Rung], method: Method) -> tuple[Rung, ...]:
    """The rungs that change something for a method: a noise seed needs samples, steps and the energy penalty need chains."""
    applies = {"seed": bool(method.samples), "lr": True, "steps": method.has_chains, "energy_l2": method.has_chains}
    return tuple(rung for rung in ladder if applies[rung.change])


def describe(rung: Rung) -> str:
    return {
        "seed": "a new noise seed",
        "lr": f"the rate x {rung.by}",
        "steps": f"the chain steps x {rung.by}",
        "energy_l2": f"an energy penalty of {rung.by}",
    }[rung.change]


def adjusted(settings: TrainingSettings, climbed: Sequence[Rung]) -> tuple[TrainingSettings, int]:
    """The settings after these rungs, which add up, and the number of new noise seeds among them."""
    rate, steps, penalty, seeds = settings.optimizer.lr, float(settings.chain.steps), settings.weights.energy_l2, 0
    for rung in climbed:
        if rung.change == "seed":
            seeds += 1
        elif rung.by is not None:
            rate = rate * rung.by if rung.change == "lr" else rate
            steps = steps * rung.by if rung.change == "steps" else steps
            penalty = max(penalty, rung.by) if rung.change == "energy_l2" else penalty
    changes = {"optimizer": {"lr": rate}, "chain": {"steps": math.ceil(steps)}, "weights": {"energy_l2": penalty}}
    return TrainingSettings.model_validate(merge(settings.model_dump(), changes)), seeds
