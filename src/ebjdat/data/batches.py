"""Device-resident batches with augmentation, as functions of (seed, epoch, step) alone.

Every random number of a run comes from a generator that is seeded by what it is for and the step it is for. A run that
was killed therefore continues bit for bit from its step count; no generator state has to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.data.prepared import Prepared
from ebjdat.params import AugmentSettings
from ebjdat.pixels import internal_from_unit, unit_from_uint8


def generator(device: torch.device, *purpose: int | str) -> torch.Generator:
    """A generator on `device` seeded by a hash of its purpose, e.g. ("train", seed, step)."""
    seed = int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Batch:
    """x: images of the p(y|x) terms; x_density: the same ones for the p(x) term; y: labels (B,).

    x_density differs by noise and, for SADA-JEM, by not being augmented; where nothing differs it is x itself. Images are
    (B, C, H, W) in [-1, 1].
    """

    x: Tensor
    x_density: Tensor
    y: Tensor

    def part(self, rows: slice) -> Batch:
        x = self.x[rows]
        return Batch(x, x if self.x_density is self.x else self.x_density[rows], self.y[rows])


class DeviceData:
    """A split on the device: uint8 images (N, C, H, W) and labels (N,)."""

    def __init__(self, prepared: Prepared, split: str, device: torch.device, n: int | None = None) -> None:
        images, labels = prepared.split(split, n)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.device = device

    def __len__(self) -> int:
        return len(self.labels)

    def unit(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images in [0, 1]."""
        return unit_from_uint8(self.images[index])

    def internal(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images in [-1, 1]."""
        return internal_from_unit(self.unit(index))


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches only: batch statistics and the ratio of chains to images stay the same at every step."""
    return n // batch_size


def epoch_batches(data: DeviceData, batch_size: int, augment: AugmentSettings, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
    """Shuffled, augmented batches of one epoch, from step `first` on."""
    order = torch.randperm(len(data), generator=generator(torch.device("cpu"), "order", seed, epoch)).to(data.device)
    for step in range(first, steps_per_epoch(len(data), batch_size)):
        index = order[step * batch_size : (step + 1) * batch_size]
        noise = generator(data.device, "augment", seed, epoch, step)
        x = internal_from_unit(unit_from_uint8(random_crop_flip(data.images[index], augment, noise)))
        x_density = data.internal(index) if augment.density == "plain" and augment.changes else x
        if augment.noise:
            x_density = x_density + augment.noise * torch.randn(x.shape, generator=noise, device=x.device)
        yield Batch(x, x_density, data.labels[index])


def random_crop_flip(images: Tensor, augment: AugmentSettings, noise: torch.Generator) -> Tensor:
    """Reflect-pad by `augment.pad`, crop each image at a random place, flip each with chance 1/2 if `augment.flip`."""
    b, _, h, w = images.shape
    device = images.device
    if augment.pad:
        p = augment.pad
        padded = F.pad(images.float(), (p, p, p, p), mode="reflect").to(images.dtype)
        top = torch.randint(0, 2 * p + 1, (b, 1), generator=noise, device=device) + torch.arange(h, device=device)  # (B, H)
        left = torch.randint(0, 2 * p + 1, (b, 1), generator=noise, device=device) + torch.arange(w, device=device)  # (B, W)
        rows = torch.arange(b, device=device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[rows, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W)
    if augment.flip:
        flipped = torch.rand(b, generator=noise, device=device) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    return images
