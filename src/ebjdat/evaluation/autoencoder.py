"""A sparse autoencoder of a network's features as a detector: it reconstructs those of usual images better than others'.

A baseline beside energy and confidence. Like them it is worth what it says of an attack that knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import generator
from ebjdat.evaluation.robust import batches
from ebjdat.samplers.pgd import Score
from ebjdat.settings import AutoencoderSettings

Network = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (B, C, H, W) in [0, 1] -> penultimate features (B, F), logits (B, K)
BATCH = 256


@dataclass(frozen=True)
class Autoencoder:
    """Features (B, F), scaled by those it was trained on -> width units that are not negative -> features.

    mean, std: (F,). encoder: (F, width). bias: (width,). decoder: (width, F), rows of length 1. offset: (F,).
    """

    mean: Tensor
    std: Tensor
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    offset: Tensor

    def units(self, features: Tensor) -> Tensor:
        return F.relu((features - self.mean) / self.std @ self.encoder + self.bias)

    def error(self, features: Tensor) -> Tensor:
        """Mean squared error (B,) of the scaled features: 1, about, for the mean of those it was trained on."""
        return self._error(features, self.units(features))

    def loss(self, features: Tensor, sparsity: float) -> Tensor:
        """Error and `sparsity` times the mean activity of the units, over the features."""
        units = self.units(features)
        return self._error(features, units).mean() + sparsity * units.mean()

    def _error(self, features: Tensor, units: Tensor) -> Tensor:
        reconstructed = units @ F.normalize(self.decoder, dim=1) + self.offset
        return (reconstructed - (features - self.mean) / self.std).square().mean(1)


def fit(features: Tensor, settings: AutoencoderSettings, seed: int) -> Autoencoder:
    """Trained with Adam on features (N, F); the same ones, settings and seed give the same weights on a machine."""
    features, draw = features.detach().float(), generator(torch.device("cpu"), "autoencoder", seed)
    size, width = features.shape[1], settings.width
    std = features.std(0, correction=0)
    decoder = F.normalize(torch.randn(width, size, generator=draw), dim=1).to(features.device)
    start = {"encoder": decoder.T.clone(), "bias": decoder.new_zeros(width), "decoder": decoder, "offset": decoder.new_zeros(size)}
    weights = {name: nn.Parameter(value) for name, value in start.items()}
    model = Autoencoder(features.mean(0), torch.where(std > 0, std, 1.0), **weights)
    optimizer = torch.optim.Adam(weights.values(), lr=settings.lr)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(features), generator=draw).to(features.device).split(BATCH):
            with torch.enable_grad():
                loss = model.loss(features[rows], settings.sparsity)
                gradients = torch.autograd.grad(loss, list(weights.values()))
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
    return Autoencoder(model.mean, model.std, **{name: weight.detach() for name, weight in weights.items()})


def shuffled(features: Tensor, seed: int) -> Tensor:
    """Features (N, F) that are each taken from another image: each has its distribution, none goes with the others."""
    noise = torch.rand(features.shape, generator=generator(torch.device("cpu"), "autoencoder control", seed))
    return features.gather(0, noise.argsort(0).to(features.device))


@dataclass(frozen=True)
class Detector:
    """An autoencoder of a network's features. evasion: weight of its error in the attack that knows it."""

    network: Network
    model: Autoencoder
    evasion: float
    batch_size: int

    @classmethod
    def of(cls, network: Network, train: Tensor, settings: AutoencoderSettings, seed: int, batch_size: int) -> Detector:
        """Trained on features of images (N, C, H, W) in [0, 1]."""
        return cls(network, fit(_features(network, train, batch_size), settings, seed), settings.evasion, batch_size)

    def scores(self, x: Tensor) -> NDArray[np.float64]:
        """Minus the error (N,) of images in [0, 1]: higher, the more an image is like those that it was trained on."""
        return (-self.model.error(_features(self.network, x, self.batch_size))).double().cpu().numpy()

    def errors(self, x: Tensor, seed: int) -> dict[str, float]:
        """Mean errors of images, and of the control: their features, each taken from another image."""
        features = _features(self.network, x, self.batch_size)
        sets = {"autoencoder_error": features, "autoencoder_error_shuffled": shuffled(features, seed)}
        return {name: float(self.model.error(each).double().mean()) for name, each in sets.items()}

    def evading_score(self, _: nn.Module, x: Tensor, y: Tensor) -> Score:
        """CE(moved, y) - evasion * error(features of moved): misclassified, and like training images to the detector. PGD climbs it."""

        def score(moved: Tensor) -> Tensor:
            features, logits = self.network(moved)
            return F.cross_entropy(logits, y, reduction="none") - self.evasion * self.model.error(features)

        return score


@torch.no_grad()
def _features(network: Network, x: Tensor, batch_size: int) -> Tensor:
    """Penultimate features (N, F) of images in [0, 1]."""
    return torch.cat([network(x[part])[0] for part in batches(len(x), batch_size)])
