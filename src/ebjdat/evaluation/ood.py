"""Out-of-distribution sets: made from test images, or other sets brought to their shape. All in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ebjdat import registry
from ebjdat.data.batches import generator
from ebjdat.data.sources import Raw, check_range
from ebjdat.errors import DataError
from ebjdat.pixels import UNIT, unit_from_uint8
from ebjdat.settings import AUTO, DataSettings, ReliabilitySettings

MADE = tuple(registry.MADE_SETS)
NATURAL = ("svhn", "cifar100", "folder")  # what `auto` looks for beside colour images
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow makes grey of RGB


@dataclass(frozen=True)
class OODSource:
    """Where other sets are. root: torchvision's; path: class folders; download: whether what is missing may be fetched."""

    root: str
    path: str | None
    download: bool
    seed: int


def made(name: str, x: Tensor, where: OODSource) -> Tensor:
    """As many images as x (N, C, H, W), made from them (data/made.py)."""
    images: Tensor = registry.load(registry.MADE_SETS, name)(x, generator(x.device, f"ood {name}", where.seed))
    return images


def natural(name: str, x: Tensor, where: OODSource) -> Tensor:
    """Test images of a data source, brought to the shape of x. Raises DataError where they are missing or damaged."""
    record, read = registry.SOURCES[name], registry.load(registry.SOURCES, name)
    more: dict[str, Any] = {"path": where.path, "size": x.shape[-1]} if "path" in record.reads else {"root": where.root}
    if "path" in more and not where.path:
        raise DataError("evaluation.reliability.ood_path names no folder or archive")
    settings = DataSettings(source=name, validation=1, **more)
    raw: Raw = read(settings, ("test",), where.download) if record.downloads else read(settings)
    images = raw.images[raw.test]
    check_range(images, where.path or name)
    return _like(images, x, where)


def _like(images: NDArray[np.uint8], x: Tensor, source: OODSource) -> Tensor:
    """At most len(x) of images (M, C', H', W'), sampled without replacement, in the shape and on the device of x (N, C, H, W)."""
    _, c, h, w = x.shape
    order = torch.randperm(len(images), generator=generator(torch.device("cpu"), "ood order", source.seed))[: len(x)]
    unit = unit_from_uint8(torch.from_numpy(images)[order].to(x.device))
    if unit.shape[1] > c:
        unit = (unit * unit.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    if unit.shape[2:] != (h, w):
        unit = F.interpolate(unit, (h, w), mode="bicubic", antialias=True).clamp(*UNIT)
    return unit.expand(-1, c, -1, -1).contiguous()


def choose(x: Tensor, data: DataSettings, settings: ReliabilitySettings) -> tuple[dict[str, Tensor], dict[str, str]]:
    """OOD sets by name, as images in [0, 1] of the shape of test images x; and, of `auto`, what is missing and why.

    `auto`: MADE; beside colour images NATURAL too, of which nothing is downloaded and the data's own set is left out; and a
    folder that was named. Raises DataError where a set that was requested by name or path is unavailable.
    """
    automatic = AUTO in settings.ood
    names = settings.ood
    if automatic:
        others = [name for name in NATURAL if x.shape[1] == 3 or (name == "folder" and settings.ood_path)]
        names = (*MADE, *(name for name in others if name == "folder" or name != data.source))
    source = OODSource(data.root, settings.ood_path, not automatic, settings.seed)
    available, missing = {}, {}
    for name in names:
        try:
            available[name] = (made if name in MADE else natural)(name, x, source)
        except DataError as error:
            if not automatic or (name == "folder" and settings.ood_path):
                raise DataError(f"evaluation.reliability.ood: {name!r} is unavailable: {error}") from error
            missing[name] = f"not available: {error}"
    return available, missing
