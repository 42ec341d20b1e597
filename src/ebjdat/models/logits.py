"""What a network's logits say: the one place where they become a class."""

from __future__ import annotations

import torch
from torch import Tensor

NO_CLASS = -1  # equals no label


def predicted(logits: Tensor) -> Tensor:
    """Class (N,) of each row of logits (N, K); NO_CLASS where one of the row is not finite, since argmax would say 0 of NaN."""
    return logits.argmax(1).where(torch.isfinite(logits).all(1), NO_CLASS)
