"""Energies of the classifier read as an energy-based model (Grathwohl et al. 2020, arXiv 1912.03263)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Energy = Callable[[Tensor], Tensor]  # logits (B, K) -> (B,)


def marginal_energy(logits: Tensor) -> Tensor:
    """E(x) = -logsumexp_y f(x)[y]; logits (B, K) -> (B,)."""
    return -logits.logsumexp(1)


def joint_energy(logits: Tensor, y: Tensor) -> Tensor:
    """E(x, y) = -f(x)[y]; logits (B, K), y (B,) -> (B,)."""
    return -logits.gather(1, y[:, None]).squeeze(1)
