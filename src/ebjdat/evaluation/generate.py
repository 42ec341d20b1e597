"""Fresh chains and the training buffer, measured against real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import generator
from ebjdat.evaluation.fidelity import compare
from ebjdat.evaluation.frechet import Array, Features, frechet_distance
from ebjdat.evaluation.robust import batches, predictions
from ebjdat.models.logits import predicted
from ebjdat.models.modes import UnitRange, frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.pixels import INTERNAL, uint8_from_unit, unit_from_internal, unit_from_uint8
from ebjdat.progress import Bar
from ebjdat.samplers.chains import run_chain, strides
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import STANDARD, ChainSettings, GenerateSettings

MOST_FRAMES = 24  # of a watched chain, beside its start
COUNTS = ("frechet_against", "n_samples", "n_reference")  # beside every protocol's distances


@dataclass(frozen=True)
class Samples:
    """images: uint8 (N, C, H, W); labels: (N,), the class whose start began each chain.

    lost: how many of them left the numbers: a pixel was not finite, and is black here.
    """

    images: Tensor
    labels: Tensor
    lost: int = 0


def fresh_chains(
    model: WideResNet,
    pool: StartPool,
    chain: ChainSettings,
    settings: GenerateSettings,
    title: str = "generate",
    conditional: bool = False,
) -> tuple[Samples, Samples]:
    """settings.n chains from the method's own start, settings.steps full gradients each, classes in turn, none discarded.

    They walk down E(x), or down E(x, y) of their start's class if conditional, whatever the training's chains did; starts
    and noise are the same for both. Returns where they end, and where they started: what the chain adds is the difference.
    """
    device = pool.mean.device
    spec = _spec(chain, settings, conditional)
    labels = _classes_in_turn(pool, settings)
    starts, ends, lost = [], [], 0
    with Bar(f"{title}: fresh chains", settings.n) as bar, frozen_parameters(model, spec.mode):
        for part in batches(settings.n, settings.batch_size):
            noise = generator(device, "generate", settings.seed, part.start)
            x = registry.load(registry.STARTS, spec.start)(pool, labels[part], noise)
            starts.append(_uint8(x))
            x = run_chain(model, x, labels[part], spec, noise)
            lost += int((~torch.isfinite(x).flatten(1).all(1)).sum())
            ends.append(_uint8(x))
            bar.advance(part.stop - part.start)
    return Samples(torch.cat(ends), labels, lost), Samples(torch.cat(starts), labels)


def watched_chains(
    model: WideResNet, pool: StartPool, chain: ChainSettings, settings: GenerateSettings, conditional: bool = False
) -> tuple[Tensor, list[int]]:
    """The first batch of `fresh_chains` once more, seen on its way.

    Returns uint8 (T, B, C, H, W) and after how many steps each of the T was seen: the start, the end, and at most 23 evenly
    between. The whole batch walks, since with batch norm in train mode its chains depend on each other.
    """
    spec = _spec(chain, settings, conditional)
    labels = _classes_in_turn(pool, settings)[: settings.batch_size]
    noise = generator(pool.mean.device, "generate", settings.seed, 0)
    seen_at = np.linspace(0, spec.steps, min(spec.steps, MOST_FRAMES) + 1).round().astype(int).tolist()
    with frozen_parameters(model, spec.mode):
        x = registry.load(registry.STARTS, spec.start)(pool, labels, noise)
        frames = [_uint8(x)]
        frames += [_uint8(x) for step, x in enumerate(strides(model, x, labels, spec, noise), 1) if step in seen_at]
    return torch.stack(frames), seen_at


def _spec(chain: ChainSettings, settings: GenerateSettings, conditional: bool) -> ChainSettings:
    return chain.model_copy(update={"steps": settings.steps, "conditional": conditional})


def _classes_in_turn(pool: StartPool, settings: GenerateSettings) -> Tensor:
    return torch.arange(settings.n, device=pool.mean.device) % len(pool.mean)


def _uint8(x: Tensor) -> Tensor:
    """What is not finite becomes black; `fresh_chains` counts it."""
    return uint8_from_unit(unit_from_internal(x.nan_to_num(*[INTERNAL[0]] * 3)))


@torch.no_grad()
def most_confident(model: nn.Module, images: Tensor, fraction: float, batch_size: int) -> Tensor:
    """Places of the images (uint8, (N, C, H, W)) that a network of [0, 1] images is surest of, as released with arXiv 2505.19459.

    Of the n images predicted as a class, the int(n * fraction) with the highest softmax probability; the earlier of equals.
    """
    logits = torch.cat([model(unit_from_uint8(images[part])) for part in batches(len(images), batch_size)])
    confidence, classes = logits.softmax(1).amax(1), predicted(logits)
    kept = []
    for k in range(logits.shape[1]):
        members = torch.nonzero(classes == k).flatten()
        surest = confidence[members].argsort(descending=True, stable=True)
        kept.append(members[surest[: int(len(members) * fraction)]])
    return torch.cat(kept)


def measure(
    model: WideResNet,
    samples: Mapping[str, Samples | None],
    starts: Samples,
    real: Mapping[str, Array],
    extractor: str,
    features: Features,
    settings: GenerateSettings,
) -> dict[str, Any]:
    """The samples under each protocol, each set of them against the training images, and how often a chain keeps its class.

    samples: "fresh", "conditional" and "buffer" (None: there is none). real: features of the "train" images and of "all".
    A name begins with its protocol, unless that is the standard one, and ends with its set, unless that is the fresh chains.
    """
    judge = UnitRange(model).eval()
    seen = {name: None if of is None else features(of.images) for name, of in samples.items()}
    seen |= {name: np.full_like(seen[name], np.nan) for name, of in samples.items() if of is not None and of.lost}  # no distance of these
    result: dict[str, Any] = {"frechet_extractor": extractor}
    for name, protocol in settings.protocols.items():
        points, against = seen[protocol.source], real[protocol.against]
        source = samples[protocol.source]
        if points is not None and source is not None and protocol.select < 1:
            images = source.images.to(starts.images.device)
            points = points[most_confident(judge, images, protocol.select, settings.batch_size).cpu().numpy()]
        found: dict[str, Any] = {**compare(points, against, extractor, features), **dict.fromkeys(COUNTS)}
        if points is not None:
            found |= zip(COUNTS, (protocol.against, len(points), len(against)), strict=True)
        result |= {key if name == STANDARD else f"{name}_{key}": value for key, value in found.items()}
    for name in ("conditional", "buffer"):
        points = seen[name]
        result |= {f"{key}_{name}": value for key, value in compare(points, real["train"], extractor, features).items()}
        result[f"n_{name}"] = 0 if points is None else len(points)
    result["n_chains_not_finite"] = sum(of.lost for of in samples.values() if of is not None)
    for key, name in (("class_agreement", "fresh"), ("class_agreement_conditional", "conditional")):
        of = samples[name]
        assert of is not None
        agree = predictions(judge, unit_from_uint8(of.images), settings.batch_size) == of.labels
        result[key] = float(agree.float().mean())
    return {**result, "frechet_start": frechet_distance(features(starts.images), real["train"])}
