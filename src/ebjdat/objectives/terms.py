"""What a loss takes and returns."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Samples = Mapping[str, Tensor]  # name in registry.SAMPLES -> images (B, C, H, W) in [-1, 1], or displacements of such


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
