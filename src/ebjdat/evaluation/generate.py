"""Fresh chains and the training buffer, measured against the training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.data.batches import DeviceData, generator
from ebjdat.evaluation.frechet import Features, frechet_distance
from ebjdat.evaluation.robust import batches, predictions
from ebjdat.models.modes import UnitRange, moving_images
from ebjdat.models.wrn import WideResNet
from ebjdat.params import ChainSettings, GenerateSettings
from ebjdat.pixels import uint8_from_unit, unit_from_internal, unit_from_uint8
from ebjdat.progress import Bar
from ebjdat.samplers.chains import walk
from ebjdat.samplers.starts import StartPool


@dataclass(frozen=True)
class Samples:
    """images: uint8 (N, C, H, W); labels: (N,), the class whose start began each chain."""

    images: Tensor
    labels: Tensor


def fresh_chains(
    model: WideResNet, pool: StartPool, chain: ChainSettings, settings: GenerateSettings, title: str = "generate"
) -> tuple[Samples, Samples]:
    """settings.n chains from the method's own start, settings.steps full gradients each, classes in turn, none discarded.

    Returns where they end, and where they started: what the chain itself adds is the difference.
    """
    device = pool.mean.device
    spec = chain.model_copy(update={"steps": settings.steps})
    start = registry.load(registry.STARTS, spec.start)
    labels = torch.arange(settings.n, device=device) % len(pool.mean)
    starts, ends = [], []
    with Bar(f"{title}: fresh chains", settings.n) as bar, moving_images(model, spec.mode):
        for part in batches(settings.n, settings.batch_size):
            noise = generator(device, "generate", settings.seed, part.start)
            x = start(pool, labels[part], noise)
            starts.append(uint8_from_unit(unit_from_internal(x)))
            ends.append(uint8_from_unit(unit_from_internal(walk(model, x, labels[part], spec, noise))))
            bar.advance(part.stop - part.start)
    return Samples(torch.cat(ends), labels), Samples(torch.cat(starts), labels)


def measure(
    model: WideResNet,
    fresh: Samples,
    starts: Samples,
    buffer: Samples | None,
    train: DeviceData,
    extractor: str,
    features: Features,
    batch_size: int,
) -> dict[str, Any]:
    """Fréchet distances to the training images, and how often the network gives a fresh chain the class it started from."""
    reference = features(train.images)
    unit = unit_from_uint8(fresh.images)
    agree = predictions(UnitRange(model).eval(), unit, batch_size) == fresh.labels
    return {
        "frechet": frechet_distance(features(fresh.images), reference),
        "frechet_extractor": extractor,
        "frechet_against": "train",
        "n_samples": len(fresh.images),
        "n_reference": len(train),
        "class_agreement": float(agree.float().mean()),
        "frechet_start": frechet_distance(features(starts.images), reference),
        "frechet_buffer": None if buffer is None else frechet_distance(features(buffer.images), reference),
        "n_buffer": 0 if buffer is None else len(buffer.images),
    }
