"""Scores on the validation split, which select the checkpoint, and on fixed training images, which show whether training overfits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import DeviceData, generator
from ebjdat.models.energy import marginal_energy
from ebjdat.models.logits import predicted
from ebjdat.models.modes import evaluating
from ebjdat.objectives.sampling import neighbours
from ebjdat.settings import TrainingSettings
from ebjdat.training.state import Job, Learner

BATCH = 250
WATCHED = 128  # training images whose accuracy is followed


def validate(learner: Learner, job: Job, validation: DeviceData, row: dict[str, float]) -> float:
    """Add validation accuracies and mean energy to the row, also those of the averaged weights.

    Returns the score that selects, which is that of the raw weights.
    """
    selection = job.settings.selection.score or registry.METHODS[job.method].selection
    networks: dict[str, nn.Module] = {"": learner.model}
    if learner.ema is not None:
        networks["ema_"] = learner.ema.module
    for prefix, network in networks.items():
        for name, value in scores(network, job.settings, validation, robust=selection != "clean").items():
            row[f"{prefix}validation_{name}"] = value
    if selection != "clean_and_robust":
        return row[f"validation_{selection}_acc"]
    return (row["validation_clean_acc"] + row["validation_robust_acc"]) / 2


def scores(model: nn.Module, settings: TrainingSettings, validation: DeviceData, robust: bool) -> dict[str, float]:
    """Clean accuracy, mean E(x) and, if `robust`, accuracy under a 10-step projected gradient on cross-entropy; in eval mode.

    Every method meets the same attack; only its radius, in [0, 1] pixels, is the settings'.
    """
    clean = right = 0
    energy = 0.0
    for start in range(0, len(validation), BATCH):
        index = slice(start, start + BATCH)
        x, y = validation.internal(index), validation.labels[index]
        with evaluating(model):
            logits = model(x)
            clean += int((predicted(logits) == y).sum())
            energy += float(marginal_energy(logits).sum())
        if robust:
            right += resisted(model, x, y, settings, generator(validation.device, "validation", start))
    n = len(validation)
    return {"clean_acc": clean / n, **({"robust_acc": right / n} if robust else {}), "energy": energy / n}


def resisted(model: nn.Module, x: Tensor, y: Tensor, settings: TrainingSettings, noise: torch.Generator) -> int:
    """How many of the images x (B, C, H, W) in [-1, 1] are right after validation's attack: PGD-10 on cross-entropy, in eval mode."""
    fixed = {"score": "ce", "steps": 10, "step_ratio": None, "start": "uniform", "start_ratio": 1.0, "project": True, "range": "unit"}
    moved = neighbours(model, x, y, settings.adversary.model_copy(update={**fixed, "mode": "eval"}), noise)
    with evaluating(model):
        return int((predicted(model(moved)) == y).sum())


def watched_accuracy(model: nn.Module, settings: TrainingSettings, training: DeviceData) -> float:
    """Accuracy on the first training images, always the same, under that attack. It shows catastrophic overfitting to a weaker one."""
    n, size = min(WATCHED, len(training)), settings.batch_size // settings.compute.accumulate
    right = 0
    for start in range(0, n, size):
        index = slice(start, min(start + size, n))
        noise = generator(training.device, "watched", start)
        right += resisted(model, training.internal(index), training.labels[index], settings, noise)
    return right / n
