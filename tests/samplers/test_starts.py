"""Chain starts, against numpy's covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.samplers.starts import StartPool, class_gaussians, data, uniform


def test_class_gaussians_have_the_training_images_mean_and_covariance() -> None:
    """Against numpy's covariance in [-1, 1], on correlated mid-grey images that clamping cannot reach."""
    source = np.random.default_rng(0)
    mixed = source.normal(size=(60, 16)) @ source.normal(size=(16, 16)) * 3 + 128
    labels = np.arange(60) % 2
    images = mixed.clip(0, 255).round().astype(np.uint8).reshape(60, 1, 4, 4)
    index = np.arange(60)
    mean = np.stack([images[labels == k].mean(0) / 255 for k in range(2)]).astype(np.float32)
    data = DeviceData(Prepared(images, labels, index, index, index, mean, ("a", "b"), ""), "train", torch.device("cpu"))
    n = 40_000
    rng = torch.Generator().manual_seed(0)
    drawn = class_gaussians(StartPool.of(data, torch.from_numpy(mean)), torch.ones(n, dtype=torch.long), rng).flatten(1).numpy()
    x = images[labels == 1].reshape(-1, 16) / 255 * 2 - 1
    expected = np.cov(x.T) + 1e-4 * np.eye(16)
    spread = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    # standard error of a covariance is at most spread * sqrt(2 / n) = 0.7 %; the floor alone is 1 to 2 % of a variance
    assert np.abs((np.cov(drawn.T) - expected) / spread).max() < 0.03
    assert np.abs((drawn.mean(0) - x.mean(0)) / x.std(0)).max() < 5 / n**0.5
    assert 1e-4 / expected.diagonal().max() > 0.001


def test_class_gaussians_follow_their_labels(digits: Prepared, pool: StartPool, rng: torch.Generator) -> None:
    labels = torch.arange(300) % 10
    drawn = class_gaussians(pool, labels, rng)
    distance = ((drawn[:, None] - pool.mean[None]) ** 2).flatten(2).sum(2)
    assert (distance.argmin(1) == labels).float().mean() > 0.8


def test_data_starts_are_training_images_of_their_class(pool: StartPool, rng: torch.Generator) -> None:
    labels = torch.arange(200) % 10
    x = data(pool, labels, rng)
    images = pool.data.internal()
    for i in range(0, 200, 7):
        same = (images == x[i]).flatten(1).all(1)
        assert same.any()
        assert (pool.data.labels[same] == labels[i]).all()
    assert len(torch.unique(x.flatten(1), dim=0)) > 100


def test_uniform_starts(pool: StartPool, rng: torch.Generator) -> None:
    x = uniform(pool, torch.zeros(500, dtype=torch.long), rng)
    assert x.shape == (500, 1, 8, 8)
    assert x.abs().max() <= 1
    assert x.var() == pytest.approx(1 / 3, rel=0.02)  # of a uniform on [-1, 1]
