"""Replay buffer of persistent chains (Du & Mordatch 2019; arXiv 1912.03263)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebjdat.data.batches import share

Start = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Chains:
    """The chains of one step: slots of the buffer (B,), images x (B, C, H, W) in [-1, 1], the classes they started from (B,)."""

    slots: Tensor
    x: Tensor
    labels: Tensor

    def part(self, i: int, of: int) -> Chains:
        """The i-th of `of` equal slices."""
        return Chains(share(self.slots, i, of), share(self.x, i, of), share(self.labels, i, of))


@dataclass(frozen=True)
class Plan:
    """Which chains each of S steps runs, and which of them start afresh. Made at once, so that steps wait for no device.

    slots (S, B); again (S, B): whether a chain starts afresh, then from fresh[which] (S, B), images of its slot's class.
    """

    slots: Tensor
    again: Tensor
    which: Tensor
    fresh: Tensor


class ReplayBuffer:
    """images: (N, C, H, W) in [-1, 1]; labels: (N,), the class whose start began the chain. Both on the training device."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    @classmethod
    def fresh(cls, size: int, classes: int, start: Start, device: torch.device, generator: torch.Generator) -> ReplayBuffer:
        labels = torch.arange(size, device=device) % classes
        return cls(start(labels, generator), labels)

    def plan(self, steps: int, n: int, reinit: float, start: Start, generator: torch.Generator) -> Plan:
        """Slots for `steps` steps of n chains, in each without repetition; each chain starts afresh with chance `reinit`.

        n may exceed the buffer's size; slots repeat within a step only then. generator: on the buffer's device.
        """
        size, device = len(self.images), self.images.device
        rounds = -(-n // size)
        order = [torch.randperm(size, generator=generator, device=device) for _ in range(steps * rounds)]
        slots = torch.cat(order).view(steps, rounds * size)[:, :n]
        again = torch.rand(steps, n, generator=generator, device=device) < reinit
        which = (again.flatten().cumsum(0) - 1).clamp_min(0).view(steps, n)
        labels = self.labels[slots[again]]
        return Plan(slots, again, which, start(labels, generator) if len(labels) else torch.zeros_like(self.images[:1]))

    def take(self, plan: Plan, step: int) -> Chains:
        """The chains of a plan's step, as they lie in the buffer now or start afresh."""
        slots, again = plan.slots[step], plan.again[step]
        x = torch.where(again[:, None, None, None], plan.fresh[plan.which[step]], self.images[slots])
        return Chains(slots, x, self.labels[slots])

    def put(self, slots: Tensor, x: Tensor) -> None:
        self.images[slots] = x.detach()
