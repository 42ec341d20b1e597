"""A screen of attacks: input gradients predicted from forward features by ridge regression, without a backward pass.

After arXiv 2605.14868 (its details are not confirmed, so: gradient-prediction style). It ranks what is worth attacking in
earnest, and says how linear a network's gradients are in its features; it is an attack too weak to be a robustness figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.data.batches import generator
from ebjdat.evaluation.robust import batches
from ebjdat.models.logits import predicted
from ebjdat.pixels import UNIT

Network = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (B, C, H, W) in [0, 1] -> penultimate features (B, F), logits (B, K)


def hidden_and_gradients(network: Network, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """h = (penultimate features, p - e_y), (N, F + K), and the gradients (N, D) of cross-entropy in the pixels of x; float64."""
    hidden, gradients = [], []
    for part in batches(len(x), batch_size):
        at = x[part].detach().requires_grad_(True)
        with torch.enable_grad():
            features, logits = network(at)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y[part], reduction="sum"), at)
        error = logits.detach().double().softmax(1) - F.one_hot(y[part], logits.shape[1])
        hidden.append(torch.cat([features.detach().double(), error], 1))
        gradients.append(gradient.double().flatten(1))
    return torch.cat(hidden), torch.cat(gradients)


def ridge(hidden: Tensor, gradients: Tensor, strength: float) -> Tensor:
    """W (F, D) with the least |h W - g|^2 + r |W|^2; r: `strength` times the mean square of a feature, summed over the images."""
    gram = hidden.T @ hidden
    r = strength * gram.diagonal().mean()
    return torch.linalg.solve(gram + r * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), hidden.T @ gradients)


def stepped(x: Tensor, direction: Tensor, radius: float) -> Tensor:
    """One sign step along a direction (N, D), as FGSM's; where it is 0, nothing moves."""
    return (x + radius * direction.sign().view_as(x).to(x.dtype)).clamp(*UNIT)


def measure(
    network: Network,
    calibration: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    radius: float,
    strength: float,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Sign agreement with the true gradient, and what the predicted step breaks relative to FGSM, on test images that are right.

    Fitted on calibration images. Beside it: fitted with the features of another image for each gradient (shuffled), and random
    signs. None where there is nothing to compare with: no image is right, FGSM breaks none, or every gradient is 0.
    """
    with torch.no_grad():
        logits = torch.cat([network(test[0][part])[1] for part in batches(len(test[0]), batch_size)])
    right = predicted(logits) == test[1]
    x, y = test[0][right], test[1][right]
    result: dict[str, Any] = {"n_screen": len(x), "n_screen_calibration": len(calibration[0])}
    names = [f"screen{kind}_{value}" for kind in ("", "_shuffled") for value in ("agreement", "success")]
    if not len(x):
        return {**result, **dict.fromkeys([*names, "screen_random_success"]), "screen_fgsm_broken": 0}
    noise = generator(torch.device("cpu"), "screen", seed)
    hidden, gradients = hidden_and_gradients(network, *calibration, batch_size)
    order = torch.randperm(len(hidden), generator=noise).to(x.device)
    at_test, true = hidden_and_gradients(network, x, y, batch_size)
    predictions = {"": at_test @ ridge(hidden, gradients, strength), "_shuffled": at_test @ ridge(hidden[order], gradients, strength)}
    random = (torch.rand(true.shape, generator=noise) - 0.5).to(true)

    def broken(direction: Tensor) -> int:
        with torch.no_grad():
            moved = [network(stepped(x[part], direction[part], radius))[1] for part in batches(len(x), batch_size)]
        return int((predicted(torch.cat(moved)) != y).sum())

    fgsm, moving = broken(true), true != 0
    result["screen_fgsm_broken"] = fgsm
    for kind, direction in predictions.items():
        agree = (direction.sign() == true.sign())[moving]
        result[f"screen{kind}_agreement"] = float(agree.double().mean()) if len(agree) else None
        result[f"screen{kind}_success"] = broken(direction) / fgsm if fgsm else None
    return {**result, "screen_random_success": broken(random) / fgsm if fgsm else None}
