"""Replay buffer of persistent chains (Du & Mordatch 2019; arXiv 1912.03263)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Start = Callable[[Tensor, torch.Generator], Tensor]


class ReplayBuffer:
    """images: (N, C, H, W) in [-1, 1]; labels: (N,), the class whose start began the chain. Both on the training device."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    @classmethod
    def fresh(cls, size: int, classes: int, start: Start, device: torch.device, generator: torch.Generator) -> ReplayBuffer:
        labels = torch.arange(size, device=device) % classes
        return cls(start(labels, generator), labels)

    def draw(self, n: int, reinit: float, start: Start, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Slots (n,) without repetition and their images; each chain starts afresh with chance `reinit`.

        n may exceed the buffer's size; slots repeat only then.
        """
        size = len(self.images)
        rounds = [torch.randperm(size, generator=generator, device=self.labels.device) for _ in range(-(-n // size))]
        slots = torch.cat(rounds)[:n]
        x = self.images[slots]
        again = torch.rand(n, generator=generator, device=x.device) < reinit
        if again.any():
            x[again] = start(self.labels[slots[again]], generator)
        return slots, x

    def put(self, slots: Tensor, x: Tensor) -> None:
        self.images[slots] = x.detach()
