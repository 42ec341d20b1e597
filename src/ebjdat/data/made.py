"""Out-of-distribution images that are made from others: functions (x (N, C, H, W) in [0, 1], generator) -> as many images in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Independent uniform pixels."""
    return torch.rand(x.shape, generator=generator, device=x.device)


def inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image's negative."""
    return 1 - x


def shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with its pixels in an order of its own; a pixel's channels stay together."""
    n, c, h, w = x.shape
    order = torch.rand(n, h * w, generator=generator, device=x.device).argsort(1)
    return x.flatten(2).gather(2, order[:, None].expand(n, c, h * w)).view_as(x)
