"""Device-resident batches with augmentation, as functions of (seed, epoch, step) alone.

Every random number of a run comes from a generator that is seeded by its purpose and step. A killed run therefore continues bit for
bit from its step count, and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.data.prepared import Prepared
from ebjdat.pixels import internal_from_unit, unit_from_uint8
from ebjdat.settings import AugmentSettings, TrainingSettings


def generator(device: torch.device, *purpose: int | str) -> torch.Generator:
    """A generator on `device` seeded by a hash of its purpose, e.g. ("train", seed, step)."""
    seed = int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Batch:
    """x: images of the p(y|x) terms; x_density: those of the p(x) term; y: labels of x (B,).

    x_density (D, C, H, W) is x itself; or the same images with other noise or, for SADA-JEM, not augmented; or D other images. x is
    (B, C, H, W); both are in [-1, 1].
    """

    x: Tensor
    x_density: Tensor
    y: Tensor

    def part(self, i: int, of: int) -> Batch:
        """The i-th of `of` equal slices."""
        x = share(self.x, i, of)
        return Batch(x, x if self.x_density is self.x else share(self.x_density, i, of), share(self.y, i, of))


def share(rows: Tensor, i: int, of: int) -> Tensor:
    """The i-th of `of` equal slices of rows."""
    n = len(rows) // of
    return rows[i * n : (i + 1) * n]


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


@dataclass(frozen=True)
class Extra:
    """Extra images: n of them are in each batch, drawn with replacement. images: uint8 (M, C, H, W); labels: (M,)."""

    images: Tensor
    labels: Tensor
    n: int

    @classmethod
    def of(cls, data: DeviceData, settings: TrainingSettings, seed: int) -> Extra:
        """As the settings say; shuffled labels are the same in every epoch."""
        labels = data.labels[_order(data, "shuffled labels", seed)] if settings.extra.shuffled_labels else data.labels
        return cls(data.images, labels, settings.extra_images)

    def mixed(self, images: Tensor, labels: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """These images and labels with n extra ones among them, in random order, so that every slice of a batch has both."""
        drawn = torch.randint(len(self.labels), (self.n,), generator=noise, device=images.device)
        order = torch.rand(len(labels) + self.n, generator=noise, device=images.device).argsort(stable=True)
        return torch.cat([images, self.images[drawn]])[order], torch.cat([labels, self.labels[drawn]])[order]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches only: batch statistics and the ratio of chains to images stay the same at every step."""
    return n // batch_size


def epoch_batches(
    data: DeviceData,
    batch_size: int,
    augment: AugmentSettings,
    seed: int,
    epoch: int,
    first: int = 0,
    own_density: int | None = None,
    extra: Extra | None = None,
) -> Iterator[Batch]:
    """Shuffled, augmented batches of one epoch, from step `first` on.

    own_density: number of images drawn separately for the p(x) term; None: it uses the labelled ones. extra: images that take places
    of the split's own. The number of steps stays, so an epoch then shows only some of the split, none of it twice.
    """
    order = _order(data, "order", seed, epoch)
    steps = steps_per_epoch(len(data), batch_size)
    own = _own_indices(data, own_density, seed, epoch * steps + first) if own_density else None
    plain = augment.density == "plain" and augment.changes
    real = batch_size - (extra.n if extra else 0)
    for step in range(first, steps):
        index = order[step * real : (step + 1) * real]
        images, labels = data.images[index], data.labels[index]
        if extra:
            images, labels = extra.mixed(images, labels, generator(data.device, "extra", seed, epoch, step))
        noise = generator(data.device, "augment", seed, epoch, step)
        x = _augmented(images, augment, noise)
        if own is not None:
            noise_own = generator(data.device, "density", seed, epoch, step)
            others = data.images[next(own)]
            x_density = _internal(others) if plain else _augmented(others, augment, noise_own)
        else:
            x_density = _internal(images) if plain else x
        if augment.noise:
            x_density = x_density + augment.noise * torch.randn(x_density.shape, generator=noise, device=x.device)
        if augment.labelled_noise:
            x = x + augment.labelled_noise * torch.randn(x.shape, generator=noise, device=x.device)
        yield Batch(x, x_density, labels)


def _order(data: DeviceData, *purpose: int | str) -> Tensor:
    return torch.randperm(len(data), generator=generator(torch.device("cpu"), *purpose)).to(data.device)


def _own_indices(data: DeviceData, n: int, seed: int, step: int) -> Iterator[Tensor]:
    """Indices (n,) of the images of the p(x) term for each training step from `step` on, in one shuffle after another."""
    a_pass = steps_per_epoch(len(data), n)
    while True:
        order = _order(data, "density order", seed, step // a_pass)
        for i in range(step % a_pass, a_pass):
            yield order[i * n : (i + 1) * n]
        step += a_pass - step % a_pass


def _internal(images: Tensor) -> Tensor:
    """uint8 images in [-1, 1]."""
    return internal_from_unit(unit_from_uint8(images))


def _augmented(images: Tensor, augment: AugmentSettings, noise: torch.Generator) -> Tensor:
    """uint8 images in [-1, 1], cropped and flipped."""
    return _internal(random_crop_flip(images, augment, noise))


def random_crop_flip(images: Tensor, augment: AugmentSettings, noise: torch.Generator) -> Tensor:
    """Reflect-pad by `augment.pad`, crop each image at random, flip each with probability 1/2 if `augment.flip`."""
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
