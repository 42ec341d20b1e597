"""The training step in the manner of EB-JDAT's released code: what `ebjdat bench --against naive` compares with.

The mathematics is that of the pipeline: from the same weights and random numbers a step ends at the same weights. The manner is not:
fp32 and NCHW, weights that keep their gradients while images move and graphs kept (retain_graph), inner PYLD steps through
the stem one by one, adversarial neighbours in slices of two images, each term of the loss by a forward pass of its own,
images augmented one by one on the CPU, the replay buffer in host memory, a fresh chain drawn for every slot whether needed
or not, and a wait for the device in every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ebjdat.errors import UserError
from ebjdat.models.modes import frozen_statistics
from ebjdat.models.wrn import WideResNet
from ebjdat.pixels import INTERNAL, internal_distance
from ebjdat.samplers.starts import COVARIANCE_FLOOR
from ebjdat.settings import AugmentSettings, ChainSettings, TrainingSettings

SLICE = 2  # images of an adversarial slice
LIMIT = 1e8  # of the loss, read in every step
METHODS = ("classifier", "pgd_at", "jempp", "eb_jdat")
SCORES = ("ce", "energy", "released", "released_ce")


class NaiveError(UserError):
    """The naive step does not implement this method or setting."""


def check(method: str, settings: TrainingSettings) -> None:
    """Raise NaiveError where the released code has no counterpart."""
    if method not in METHODS:
        raise NaiveError(f"the naive step has no method {method!r}, only {', '.join(METHODS)}")
    wrong = []
    if method in ("jempp", "eb_jdat") and (settings.chain.sampler != "pyld" or settings.chain.conditional):
        wrong.append(f"chain.sampler {settings.chain.sampler!r}, or chain.conditional (only pyld, down E(x))")
    if method in ("jempp", "eb_jdat") and settings.chain.start != "class_gaussians":
        wrong.append(f"chain.start {settings.chain.start!r} (only class_gaussians)")
    if settings.update.name != "plain" or settings.compute.accumulate > 1 or settings.weights.energy_l2 or settings.ema:
        wrong.append("update sam, ema, compute.accumulate or weights.energy_l2")
    if settings.augment.density != "augmented":
        wrong.append("augment.density 'plain' (only augmented)")
    if method in ("pgd_at", "eb_jdat") and (settings.adversary.start != "uniform" or settings.adversary.score not in SCORES):
        wrong.append(
            f"adversary.start {settings.adversary.start!r}, score {settings.adversary.score!r} (only uniform; {', '.join(SCORES)})"
        )
    if method in ("pgd_at", "eb_jdat") and (settings.adversary.step_ratio is not None or settings.adversary.start_ratio != 1):
        wrong.append("adversary.step_ratio or start_ratio")
    if method in ("pgd_at", "eb_jdat") and settings.adversary.budget.name != "uniform":
        wrong.append(f"adversary.budget {settings.adversary.budget.name!r} (only uniform)")
    if settings.weights.examples.name != "uniform":
        wrong.append(f"weights.examples {settings.weights.examples.name!r} (only uniform)")
    if method in ("pgd_at", "eb_jdat") and settings.adversary.norm != "Linf":
        wrong.append("adversary.norm 'L2' (only Linf)")
    if method in ("pgd_at", "eb_jdat") and settings.adversary.mode != "eval":
        wrong.append(
            "adversary.mode 'train' (slices of two images would have statistics of two): add --override training.adversary.mode=eval"
        )
    if wrong:
        raise NaiveError(f"the naive step has no {'; no '.join(wrong)}")


@dataclass(frozen=True)
class Noise:
    """x + std N(0, I). (A lambda could not be sent to a loader's processes.)"""

    std: float

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x)


class Pictures(Dataset[tuple[Tensor, int]]):
    """One image at a time: PIL, reflect-pad, crop, flip, to [-1, 1], noise."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], augment: AugmentSettings, noise: float) -> None:
        from torchvision import transforms

        channels, size = images.shape[1], images.shape[-1]
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.Pad(augment.pad, padding_mode="reflect"),
                transforms.RandomCrop(size),
                *([transforms.RandomHorizontalFlip()] if augment.flip else []),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * channels, (0.5,) * channels),
                Noise(noise),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = self.images[i].transpose(1, 2, 0)  # (H, W, C)
        x: Tensor = self.transform(Image.fromarray(picture if picture.shape[2] > 1 else picture[..., 0]))
        return x, int(self.labels[i])


def endless(
    images: NDArray[np.uint8], labels: NDArray[np.int64], batch_size: int, augment: AugmentSettings, noise: float, workers: int
) -> Iterator[Tensor]:
    """Batches [x (B, C, H, W), y (B,)] of a shuffling loader, over and over."""
    data = Pictures(images, labels, augment, noise)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def class_distributions(images: Tensor, labels: Tensor, device: torch.device) -> list[MultivariateNormal]:
    """A full-covariance normal per class, of images (N, C, H, W) in [-1, 1]."""
    found = []
    for k in range(int(labels.max()) + 1):
        rows = images[labels == k].flatten(1)
        deviations = rows - rows.mean(0)
        covariance = deviations.T @ deviations / max(len(rows) - 1, 1) + COVARIANCE_FLOOR * torch.eye(rows.shape[1])
        found.append(MultivariateNormal(rows.mean(0).to(device), covariance_matrix=covariance.to(device)))
    return found


@dataclass(frozen=True)
class Randomness:
    """A step's random numbers. slots (D,); fresh (D, C, H, W) and again (D,) of chains; uniform (B, C, H, W) in [-1, 1] of adversaries."""

    slots: Tensor
    fresh: Tensor
    again: Tensor
    uniform: Tensor


def randomness(x: Tensor, n: int, buffer: Tensor, fresh: list[MultivariateNormal], reinit: float) -> Randomness:
    """For n chains, as the released code draws them: slots with replacement, a start for each, one by one, on the CPU."""
    starts = torch.zeros(n, *x.shape[1:])
    for i in range(n):
        starts[i] = fresh[int(np.random.default_rng().integers(len(fresh)))].sample().view(x.shape[1:])
    return Randomness(
        torch.randint(0, len(buffer), (n,)),
        starts.clamp(*INTERNAL),
        torch.rand(n) < reinit,
        torch.empty_like(x).uniform_(-1, 1),
    )


def chains(model: WideResNet, buffer: Tensor, random: Randomness, spec: ChainSettings, device: torch.device) -> Tensor:
    """Move a batch of chains by PYLD and put them back into `buffer` (N, C, H, W), which lies in host memory."""
    again = random.again.float()[:, None, None, None]
    x = (again * random.fresh + (1 - again) * buffer[random.slots]).to(device)
    model.train(spec.mode == "train")
    with contextlib.nullcontext() if model.chains_update_statistics else frozen_statistics(model):
        for _ in range(spec.steps):
            x = x.detach().requires_grad_(True)
            h = model.stem(x)
            energy = model.trunk(h).logsumexp(1).sum()
            _, p = torch.autograd.grad(energy, [x, h], retain_graph=True)
            for _ in range(spec.inner_steps):
                x = x.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad((model.stem(x) * p.detach()).sum(), [x], retain_graph=True)
                step = gradient if spec.clamp is None else gradient.clamp(-spec.clamp, spec.clamp)
                x = (x.detach() + spec.step_size * step).clamp(*INTERNAL)
            if spec.noise:
                x = (x + spec.noise * torch.randn_like(x)).clamp(*INTERNAL)
    model.train()
    x = x.detach()
    buffer[random.slots] = x.cpu()
    return x


def score(model: nn.Module, x: Tensor, moved: Tensor, y: Tensor, name: str) -> Tensor:
    """What a slice's neighbours climb, each part of it by a forward pass of its own."""
    if name == "ce":
        return F.cross_entropy(model(moved), y, reduction="sum")
    energy: Tensor = -model(moved).gather(1, y[:, None]).sum()
    if name == "energy":
        return energy
    between = (F.normalize(model(x), dim=1) - F.normalize(model(moved), dim=1)).square().sum()
    if name == "released_ce":
        return F.cross_entropy(model(moved), y, reduction="sum") / SLICE + between
    return -energy + between


def adversaries(model: WideResNet, x: Tensor, y: Tensor, random: Randomness, settings: TrainingSettings) -> Tensor:
    """Adversarial neighbours in slices of two."""
    spec = settings.adversary
    scale = internal_distance(1.0) if spec.range == "unit" else 1.0
    eps, step_size = scale * spec.eps, scale * spec.step_size
    found = []
    model.eval()
    for i in range(0, len(x), SLICE):
        here, labels = x[i : i + SLICE], y[i : i + SLICE]
        moved = (here + eps * random.uniform[i : i + SLICE]).clamp(*INTERNAL)
        for _ in range(spec.steps):
            moved = moved.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(score(model, here, moved, labels, spec.score), [moved], retain_graph=True)
            moved = moved.detach() + step_size * gradient.sign()
            if spec.project:
                moved = torch.min(torch.max(moved, here - eps), here + eps)
            moved = moved.clamp(*INTERNAL)
        found.append(moved.detach())
    model.train()
    return torch.cat(found)


def step(
    method: str,
    model: WideResNet,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    buffer: Tensor,
    random: Randomness,
    settings: TrainingSettings,
) -> float:
    """One step on a batch (x, x_density, y) on the device; returns the loss."""
    x, x_density, y = batch
    weights = settings.weights
    model.train()
    negative = chains(model, buffer, random, settings.chain, x.device) if method in ("jempp", "eb_jdat") else None
    moved = adversaries(model, x, y, random, settings) if method in ("pgd_at", "eb_jdat") else None
    if method == "pgd_at":
        loss = F.cross_entropy(model(moved), y)
    else:
        loss = (1.0 if method == "classifier" else weights.w3) * F.cross_entropy(model(x), y)
    if method == "eb_jdat":
        with frozen_statistics(model):  # these two pass again what passes elsewhere; running statistics count it once
            clean_energy = -model(x_density if weights.align == "density" else x).logsumexp(1).mean()
            adversarial_energy = -model(moved).logsumexp(1).mean()
        loss = loss + weights.w2 * (adversarial_energy - clean_energy) + weights.w3 * F.cross_entropy(model(moved), y)
    if negative is not None:
        energy = -model(x_density).logsumexp(1).mean()
        loss = loss + weights.w1 * (energy + model(negative).logsumexp(1).mean())
    value = float(loss.item())
    if abs(value) > LIMIT:
        raise FloatingPointError(f"a loss of {value:.3g}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value
