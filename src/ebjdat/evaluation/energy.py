"""Energy landscape: where clean, adversarial and generated images lie, and how far apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from ebjdat.evaluation.robust import batches
from ebjdat.models.energy import joint_energy, marginal_energy
from ebjdat.samplers.pgd import MakeScore, energy_ce_score, marginal_energy_score, targeted_score

Values = NDArray[np.float64]
UNTARGETED = "untargeted"  # PGD on cross-entropy
# Other scores that PGD climbs, to see what energies do.
ATTACKS: Mapping[str, MakeScore] = {
    "targeted": targeted_score,
    "ascent": marginal_energy_score,
    "energy_aware": energy_ce_score,
}


@torch.no_grad()
def energies(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[Values, Values]:
    """E(x) and E(x, y), each (N,), of images in [0, 1]."""
    marginal, joint = [], []
    for part in batches(len(x), batch_size):
        logits = model(x[part]).double()
        marginal.append(marginal_energy(logits).cpu())
        joint.append(joint_energy(logits, y[part]).cpu())
    return torch.cat(marginal).numpy(), torch.cat(joint).numpy()


def overlap(a: Values, b: Values, bins: int = 50) -> float:
    """Overlap coefficient in [0, 1]: the common area of two histograms over one set of bins."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    edges = np.histogram_bin_edges(np.concatenate([a, b]), bins)
    if edges[0] == edges[-1]:
        return 1.0
    shares = [np.histogram(values, edges)[0] / len(values) for values in (a, b)]
    return float(np.minimum(*shares).sum())


def standard_error(values: Values) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def changes(clean: Values, attacked: Mapping[str, Values]) -> dict[str, float]:
    """Signed changes of the energy from images to what each attack made of them, row by row; over pairs of finite energies.

    energy_change_<attack>: mean E(x~) - E(x) in nats; `_se`: its standard error. energy_rise_<attack>: fraction that goes up. n: pairs.
    Means are nan where there is no such pair.
    """
    found: dict[str, float] = {}
    for name, energies_then in attacked.items():
        paired = (energies_then - clean)[np.isfinite(clean) & np.isfinite(energies_then)]
        mean, error, rise = (paired.mean(), standard_error(paired), (paired > 0).mean()) if len(paired) else (math.nan,) * 3
        found |= {f"energy_change_{name}": float(mean), f"energy_change_{name}_se": error, f"energy_rise_{name}": float(rise)}
        found[f"n_energy_change_{name}"] = len(paired)
    return found


def landscape(clean: Values, adversarial: Values, generated: Values) -> dict[str, float]:
    """Gaps between the energies of clean images, their adversarial examples (row by row) and generated images.

    energy_gap_adversarial: mean |E(x) - E(x~)| over pairs, as in the paper's figure. energy_gap_generated: |mean E(x) -
    mean E(generated)|, since these have no pairs. `*_se`: standard errors. `*_shift`: signed differences of means. An energy
    that is not finite is counted, and makes everything nan that it takes part in.
    """
    lost = [int((~np.isfinite(values)).sum()) for values in (clean, adversarial, generated)]
    clean, adversarial, generated = (np.where(np.isfinite(values), values, math.nan) for values in (clean, adversarial, generated))
    paired = adversarial - clean
    gap = np.abs(paired)
    spread = (clean.var(ddof=1) / len(clean) + generated.var(ddof=1) / len(generated)) ** 0.5
    return {
        "energy_clean": float(clean.mean()),
        "energy_adversarial": float(adversarial.mean()),
        "energy_generated": float(generated.mean()),
        "energy_gap_adversarial": float(gap.mean()),
        "energy_gap_adversarial_se": standard_error(gap),
        "energy_shift_adversarial": float(paired.mean()),
        "energy_gap_generated": float(abs(generated.mean() - clean.mean())),
        "energy_gap_generated_se": float(spread),
        "energy_shift_generated": float(generated.mean() - clean.mean()),
        "energy_overlap_adversarial": overlap(clean, adversarial),
        "energy_overlap_generated": overlap(clean, generated),
        "energy_wasserstein_adversarial": math.nan if lost[0] or lost[1] else float(wasserstein_distance(clean, adversarial)),
        "energy_wasserstein_generated": math.nan if lost[0] or lost[2] else float(wasserstein_distance(clean, generated)),
        "n_energy_not_finite": sum(lost),
        "n_energy_clean": len(clean),
        "n_energy_generated": len(generated),
    }
