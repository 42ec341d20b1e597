"""How sure a teacher is of the training images that adversarial training does not learn (arXiv 2605.21999): high is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor, nn

from ebjdat.evaluation.detection import logits_of
from ebjdat.evaluation.robust import pgd_examples
from ebjdat.models.logits import predicted
from ebjdat.settings import ProtocolSettings

Chosen = NDArray[np.bool_]


@dataclass(frozen=True)
class Learned:
    """Of N training images: how many networks are right under PGD (N,), and their mean cross-entropy without an attack (N,)."""

    robust: NDArray[np.int64]
    cross_entropy: NDArray[np.float64]
    networks: int


def learned(networks: Iterable[nn.Module], x: Tensor, y: Tensor, protocol: ProtocolSettings, seed: int, batch_size: int) -> Learned:
    """Every network attacked by the protocol's PGD on images in [0, 1]. A prediction that is not finite counts as wrong."""
    robust, losses, count = np.zeros(len(x), np.int64), np.zeros(len(x)), 0
    labels = y.cpu().numpy()
    for network in networks:
        moved = pgd_examples(network, x, y, protocol, seed, batch_size)
        logits = torch.from_numpy(logits_of(network, moved, batch_size))
        robust += (predicted(logits).numpy() == labels).astype(np.int64)
        losses -= log_softmax(logits_of(network, x, batch_size), axis=1)[np.arange(len(labels)), labels]
        count += 1
    return Learned(robust, losses / max(count, 1), count)


def sets_of(found: Learned, seed: int) -> dict[str, Chosen]:
    """Which of the N images are in each set of metrics.TEACHING. random: one draw, by the seed."""
    unlearned = found.robust == 0
    n, total = int(unlearned.sum()), len(unlearned)
    random, hardest = np.zeros(total, bool), np.zeros(total, bool)
    random[np.random.default_rng(seed).permutation(total)[:n]] = True
    hardest[np.argsort(-found.cross_entropy, kind="stable")[:n]] = True
    return {"unlearned": unlearned, "learned": found.robust == found.networks, "random": random, "hardest": hardest}


def certainty(logits: NDArray[np.float64], sets: Mapping[str, Chosen]) -> dict[str, float | int | None]:
    """A teacher's entropy in nats and its confidence (largest probability), means over each set of images; None for an empty one."""
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    entropy, confidence = -(p * log_p).sum(1), p.max(1)
    result: dict[str, float | int | None] = {}
    for name, chosen in sets.items():
        n = int(chosen.sum())
        spread = float(entropy[chosen].std(ddof=1)) / math.sqrt(n) if n > 1 else None
        result |= {
            f"teacher_entropy_{name}": float(entropy[chosen].mean()) if n else None,
            f"teacher_entropy_{name}_se": spread,
            f"teacher_confidence_{name}": float(confidence[chosen].mean()) if n else None,
            f"n_{name}": n,
        }
    return result
