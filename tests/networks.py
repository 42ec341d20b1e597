"""Small networks, images and settings that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ebjdat.settings import AttackSettings

N = 24


class Table(nn.Module):
    """Looks logits up: an "image" is the number of its row. So every logit of a loss can be chosen."""

    def __init__(self, rows: Tensor | list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.as_tensor(rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x.long()]


class Curved(nn.Module):
    """A small smooth network of random weights."""

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 40), nn.Tanh(), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 0.5) * 4)


class Of(nn.Module):
    """A network whose logits are changed on the way out."""

    def __init__(self, network: nn.Module, change: Any) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.network(x))


def images(n: int = N, side: int = 4) -> Tensor:
    """Around mid grey, so that the box [0, 1] does not bind."""
    return 0.5 + 0.2 * (torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1)) - 0.5)


def settings(eps: float, n: int = N, **more: Any) -> AttackSettings:
    """The standard protocol at a radius, the released one with the same numbers, and the standard one with less effort ("quick")."""
    numbers = {"eps": eps, "pgd": {"step_size": eps / 4}, "n": n}
    few = {"steps": 20, "targets": 3}
    less = {"apgd_ce": {"steps": 20}, "apgd_t": few, "fab_t": few, "square": {"queries": 300}}
    protocols = {"standard": numbers, "released": numbers, "quick": {"like": "standard", "attacks": less, **numbers}}
    return AttackSettings.model_validate({"protocols": protocols, "checks": {"n": n or N}, "batch_size": 64} | more)


def labelled(model: nn.Module, x: Tensor, wrong: int = 4) -> Tensor:
    """The model's own classes, but for the last few."""
    with torch.no_grad():
        y = model(x).argmax(1)
    y[len(x) - wrong :] = (y[len(x) - wrong :] + 1) % 10
    return y


def plain(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12, momentum=None), nn.Linear(12, 10))
    network(images())  # statistics of these images
    return network.eval()


def refusing(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse
