"""Out-of-distribution sets: made from test images, or other sets brought to their shape. All in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ebjdat import registry
from ebjdat.data import sources
from ebjdat.data.batches import generator
from ebjdat.errors import DataError
from ebjdat.pixels import UNIT, unit_from_uint8
from ebjdat.settings import AUTO, DataSettings, ReliabilitySettings

MADE = ("noise", "inverted", "shuffled")
NATURAL = ("svhn", "cifar100", "folder")  # what `auto` looks for beside colour images
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow makes grey of RGB


@dataclass(frozen=True)
class OODSource:
    """Where other sets are. root: torchvision's; path: class folders; download: whether what is missing may be fetched."""

    root: str
    path: str | None
    download: bool
    seed: int


def noise(x: Tensor, source: OODSource) -> Tensor:
    """Independent uniform pixels, as many images as x (N, C, H, W)."""
    return torch.rand(x.shape, generator=generator(x.device, "ood noise", source.seed), device=x.device)


def inverted(x: Tensor, source: OODSource) -> Tensor:
    return 1 - x


def shuffled(x: Tensor, source: OODSource) -> Tensor:
    """Each image of x (N, C, H, W) with its pixels in an order of its own; a pixel's channels stay together."""
    n, c, h, w = x.shape
    order = torch.rand(n, h * w, generator=generator(x.device, "ood shuffled", source.seed), device=x.device).argsort(1)
    return x.flatten(2).gather(2, order[:, None].expand(n, c, h * w)).view_as(x)


def svhn(x: Tensor, source: OODSource) -> Tensor:
    return _torchvision("SVHN", x, source)


def cifar100(x: Tensor, source: OODSource) -> Tensor:
    return _torchvision("CIFAR100", x, source)


def cifar10(x: Tensor, source: OODSource) -> Tensor:
    return _torchvision("CIFAR10", x, source)


def folder(x: Tensor, source: OODSource) -> Tensor:
    """Test images of class folders, or of an archive of them."""
    if not source.path:
        raise DataError("evaluation.reliability.ood_path names no folder or archive")
    raw = sources.folder(DataSettings(source="folder", path=source.path, size=x.shape[-1], validation=1))
    images = raw.images[raw.test]
    sources.check_range(images, source.path)
    return _like(images, x, source)


def _torchvision(name: str, x: Tensor, source: OODSource) -> Tensor:
    """Its test images. Raises DataError where it is not whole under the root, and may not or cannot be fetched."""
    try:
        images, _, _ = sources.torchvision_split(name, "test", source.root, source.download)
    except sources.MISSING as error:
        tried = f" and could not be fetched: {error}" if source.download else ""
        raise DataError(f"{name} is not (whole) under {source.root!r}{tried}") from error
    return _like(images, x, source)


def _like(images: NDArray[np.uint8], x: Tensor, source: OODSource) -> Tensor:
    """At most len(x) of images (M, C', H', W'), drawn without order, in the shape and on the device of x (N, C, H, W)."""
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
    folder that was named. Raises DataError where a set that was asked for, by its name or its path, cannot be had.
    """
    automatic = AUTO in settings.ood
    names = settings.ood
    if automatic:
        natural = [name for name in NATURAL if x.shape[1] == 3 or (name == "folder" and settings.ood_path)]
        names = (*MADE, *(name for name in natural if name == "folder" or name != data.source))
    source = OODSource(data.root, settings.ood_path, not automatic, settings.seed)
    found, missing = {}, {}
    for name in names:
        try:
            found[name] = registry.load(registry.OOD_SETS, name)(x, source)
        except DataError as error:
            if not automatic or (name == "folder" and settings.ood_path):
                raise DataError(f"evaluation.reliability.ood: {name!r} cannot be had: {error}") from error
            missing[name] = f"not available: {error}"
    return found, missing
