"""Where chains start: functions (pool, labels, generator) -> images in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebjdat.data.batches import DeviceData
from ebjdat.pixels import INTERNAL, internal_distance, internal_from_unit

COVARIANCE_FLOOR = 1e-4  # added to the diagonal of each class covariance, internal range


@dataclass(frozen=True)
class StartPool:
    """What starts are made from: the training split and, per class, its images' indices and mean."""

    data: DeviceData
    members: tuple[Tensor, ...]  # per class: indices into data
    mean: Tensor  # (K, C, H, W) in [-1, 1]

    @classmethod
    def of(cls, data: DeviceData, class_mean: Tensor) -> StartPool:
        """class_mean: (K, C, H, W) in [0, 1], as prepared."""
        members = tuple(torch.nonzero(data.labels == k).flatten() for k in range(len(class_mean)))
        return cls(data, members, internal_from_unit(class_mean.to(data.device)))


def class_gaussians(pool: StartPool, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One sample per label from N(mean_y, cov_y + 1e-4 I) of the training images in [-1, 1], clamped (JEM++).

    With deviations d_i = x_i - mean and standard normal g_i, sum_i g_i d_i / sqrt(n - 1) has exactly the sample covariance;
    so no (CHW x CHW) matrix is formed, which at 64x64x3 would take 0.6 GB per class.
    """
    x = torch.empty(len(labels), *pool.mean.shape[1:], device=labels.device)
    for k in labels.unique().tolist():
        rows = torch.nonzero(labels == k).flatten()
        deviations = (pool.data.internal(pool.members[k]) - pool.mean[k]).flatten(1)  # (n, CHW)
        n = len(deviations)
        weights = torch.randn(len(rows), n, generator=generator, device=x.device) / max(n - 1, 1) ** 0.5
        x[rows] = pool.mean[k] + (weights @ deviations).view(len(rows), *x.shape[1:])
    x = x + COVARIANCE_FLOOR**0.5 * torch.randn(x.shape, generator=generator, device=x.device)
    return x.clamp(*INTERNAL)


def data(pool: StartPool, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One training image of the class per label, drawn with replacement (as in contrastive divergence)."""
    index = torch.empty_like(labels)
    for k in labels.unique().tolist():
        rows = torch.nonzero(labels == k).flatten()
        members = pool.members[k]
        index[rows] = members[torch.randint(0, len(members), (len(rows),), generator=generator, device=members.device)]
    return pool.data.internal(index)


def uniform(pool: StartPool, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on [-1, 1] per pixel (JEM)."""
    shape = (len(labels), *pool.mean.shape[1:])
    return torch.rand(shape, generator=generator, device=labels.device) * internal_distance(1.0) + INTERNAL[0]
