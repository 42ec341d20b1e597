"""What a loss takes and returns."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ebjdat.data.batches import Batch
from ebjdat.models.wrn import WideResNet

# name in registry.SAMPLES -> (B, ...): images (B, C, H, W) in [-1, 1], or displacements of such; log_counts and a teacher's logits: (B, K)
Samples = Mapping[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """Scalars of one evaluation of an objective; all but `loss` are detached.

    loss: what is minimised. clean_ce: cross-entropy of clean images, None where the method does not see them. logged: what
    else is logged, by name. energies: mean energies, by what they are of ("clean", "adversarial", "generated"). Checks
    during training bound `clean_ce` and `energies`.
    """

    loss: Tensor
    clean_ce: Tensor | None = None
    logged: Mapping[str, Tensor] = field(default_factory=dict)
    energies: Mapping[str, Tensor] = field(default_factory=dict)

    def scalars(self) -> dict[str, Tensor]:
        """Every scalar under the name that curves have for it."""
        ce = {} if self.clean_ce is None else {"ce_clean": self.clean_ce}
        return {"loss": self.loss, **ce, **self.logged, **{f"energy_{of}": value for of, value in self.energies.items()}}


def mean(parts: Sequence[Terms]) -> Terms:
    """Means over equal slices of a batch, detached."""

    def over(values: Iterable[Tensor]) -> Tensor:
        return functools.reduce(torch.add, (value.detach() / len(parts) for value in values))

    first = parts[0]
    return Terms(
        over(part.loss for part in parts),
        None if first.clean_ce is None else over(part.clean_ce for part in parts if part.clean_ce is not None),
        {name: over(part.logged[name] for part in parts) for name in first.logged},
        {of: over(part.energies[of] for part in parts) for of in first.energies},
    )


class MethodState(Protocol):
    """What a method changes during training besides the network: made by its `state`, handed to its samples, saved with the training.

    Its factory takes (network, TrainingSettings, seed).
    """

    def after(
        self, model: WideResNet, batch: Batch, samples: Samples, terms: Terms, index: int, noise: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Change with a step that was just made, the index-th of the training, from 0; returns scalars of it that are logged."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, and mappings of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict."""
