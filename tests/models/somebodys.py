"""Factories of networks and weights as other people have them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..networks import plain, refusing


class Wrapped(nn.Module):
    """A network below a name of its own, with batch norm, whose counter some files lack."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network or plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def raising() -> nn.Module:
    raise KeyError("no\x1b[31m such\nsetting")


def leaving() -> nn.Module:
    sys.exit(2)


class Own(nn.Module):
    """A network one of whose methods is its own."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = plain()
        setattr(self, name, function)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


STATE, OTHER = plain().state_dict(), plain(1).state_dict()


FACTORIES: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "parallel": lambda: nn.DataParallel(plain()),
    "wrapped": Wrapped,
    "averaged": lambda: AveragedModel(plain()),
    "raising": raising,
    "leaving": leaving,
    "no eval": lambda: Own("eval", refusing(ValueError("no eval"))),
    "no state": lambda: Own("state_dict", refusing(KeyError("no state"))),
    "other eval": lambda: Own("eval", lambda: None),
    "lazy": lambda: nn.LazyLinear(3),
    "named": lambda: nn.Sequential(OrderedDict(conv=nn.Linear(16, 8), norm=nn.Linear(8, 10))),  # "module" lies between them
}
