"""How far an image was changed, as numbers and as eyes see it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # of the Gaussian that weighs a pixel's surroundings (Wang et al. 2004)
C1, C2 = 0.01**2, 0.03**2  # (K L)^2 of the same, for a range of pixels L = 1


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance (N,) of images (N, C, H, W), float64."""
    return (a.double() - b.double()).flatten(1).norm(dim=1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of images (N, C, H, W) in [0, 1], float64: 1 for equal ones, the mean over places and channels.

    Wang et al. 2004, IEEE TIP 13(4), equation 13, with their Gaussian window, at every place where it lies within the image;
    in images of fewer than 11 pixels a side it is the largest odd window that does.
    """
    size = min(WINDOW, *(side - 1 + side % 2 for side in a.shape[2:]))
    from_middle = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    line = torch.exp(-(from_middle**2) / (2 * SIGMA**2))
    line = line / line.sum()

    def mean(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N C, 1, H', W')
        return F.conv2d(F.conv2d(x.flatten(0, 1).unsqueeze(1), line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + C1) * (2 * covariance + C2) / ((mean_a**2 + mean_b**2 + C1) * (variances + C2))
    return similarity.view(len(a), -1).mean(1)


def measured(moved: Tensor, x: Tensor) -> Tensor:
    """(N, 2): L2 and SSIM of each image (N, C, H, W) and what an attack made of it."""
    return torch.stack([l2(moved, x), ssim(moved, x)], 1)
