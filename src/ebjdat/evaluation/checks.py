"""Integrity checks of a robustness evaluation: is the network one that the attacks can read, and did they do their work?

Each returns a value, its limit, and pass or fail; None where it does not apply. A failed check does not change a result: it
says that the result must not be trusted. Most follow Carlini et al. 2019, arXiv 1902.06705, section 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.stats import binom, binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.errors import few
from ebjdat.evaluation.robust import SLACK, batches, fp32_eval_copy, pgd_batch, pgd_start, predictions
from ebjdat.evaluation.verdicts import Verdicts, pgd_name
from ebjdat.intervals import mcnemar
from ebjdat.models.logits import NO_CLASS, predicted
from ebjdat.pixels import internal_from_unit
from ebjdat.settings import STANDARD, AttackSettings, PGDSettings, ProtocolSettings

POINT = 0.01  # one point of accuracy
DIFFERENCE = 1e-4  # of logits over their length; what another order of summation may change
CHANCE = 0.05  # p above which an accuracy is not distinguished from a guess
SURE = 0.001  # p below which another reading of images or labels is better; there are several, and each is tried
READ_ANEW = 1000  # images on which that is asked at most
LARGE = 0.5  # L-infinity radius at which every image can become the same grey one


@dataclass(frozen=True)
class Check:
    """name; passed (None: not run); value and its limit, in the unit that `says` names."""

    name: str
    passed: bool | None
    value: float | None
    limit: float | None
    says: str

    @classmethod
    def at_most(cls, name: str, value: float, limit: float, says: str) -> Check:
        value = round(value, 9)  # differences of fractions: one point is 0.01, not 0.010000000000000009
        return cls(name, value <= limit, value, limit, says)


def deterministic(model: nn.Module, x: Tensor) -> Check:
    """The same image gives the same logits, again and in another batch. x: (N, C, H, W)."""
    with torch.no_grad():
        first, *again = (model(x).nan_to_num(0, 0, 0) for _ in range(5))  # what is not finite has a check of its own
        again.append(torch.cat([model(image[None]) for image in x]).nan_to_num(0, 0, 0))
    length = first.norm(dim=1).clamp_min(1e-12)
    value = max(float(((other - first).norm(dim=1) / length).max()) for other in again)
    return Check.at_most("deterministic output", value, DIFFERENCE, "largest change of the logits between repeats, of their length")


def logits_not_probabilities(model: nn.Module, x: Tensor) -> Check:
    """Losses of attacks and energies mean nothing on softmax outputs."""
    with torch.no_grad():
        output = model(x)
    probability = (output >= 0).all(1) & ((output.sum(1) - 1).abs() < 1e-4)
    value = _share(probability)
    return Check.at_most("logits, not probabilities", value, 0.0, "share of outputs that are probabilities")


def gradients(model: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings, seed: int) -> Check:
    """Cross-entropy has a gradient at a random point of the ball around each image that is classified right there."""
    moved = pgd_start(x, 0, protocol, seed).requires_grad_(True)
    with torch.enable_grad():
        logits = model(moved)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), moved, allow_unused=False)
    right = predicted(logits) == y
    name, says = "gradients do not vanish", "share of correct images whose gradient is zero or not finite"
    if not right.any():
        return Check(name, None, None, POINT, "no image is classified right")
    size = gradient.flatten(1)[right]
    value = _share((size == 0).all(1) | ~torch.isfinite(size).all(1))
    return Check.at_most(name, value, POINT, says)


def black_box(protocol: ProtocolSettings, verdicts: Verdicts) -> Check:
    """Square, which uses no gradient, breaks no image that white-box attacks left."""
    name, says = "black-box attack adds nothing", "share of the examples that only Square breaks"
    others = [attack for attack in protocol.attacks if attack != "square"]
    if not protocol.n or not others or len(others) == len(protocol.attacks):
        return Check(name, None, None, POINT, "Square was not run after white-box attacks")
    value = _share(verdicts.robust["square"][: protocol.n] == 0)
    return Check.at_most(name, value, POINT, says)


def inside(protocol: ProtocolSettings, verdicts: Verdicts) -> Check:
    """Adversarial images, as tensors, against the ball and [0, 1]."""
    return Check.at_most("adversarial images lie in the ball and in [0, 1]", verdicts.excess, SLACK, "farthest outside")


def finite(protocol: ProtocolSettings, verdicts: Verdicts) -> Check:
    """Every logit is, on the images as they are and on those that attacks returned; else they are wrong."""
    value = _share((verdicts.prediction == NO_CLASS) | verdicts.lost)
    return Check.at_most("logits are finite", value, 0.0, "share of images for which they are not, as they are or attacked")


def above_chance(verdicts: Verdicts) -> Check:
    """Clean accuracy against that of the same predictions assigned at random, by a binomial test.

    Not asked where so few images, or so few classes among them, leave open whether a network half-way between chance and
    1 would pass; below chance it fails all the same.
    """
    name = "above chance"
    y, prediction = verdicts.y.cpu().numpy(), verdicts.prediction.cpu().numpy()
    n, right = len(y), int((y == prediction).sum())
    chance = _chance(y, prediction)
    p = float(binomtest(right, n, chance, alternative="greater").pvalue)
    says = f"p of the binomial test that {right} of {n} right are a guess's {chance:.1%}"
    below = binomtest(right, n, chance, alternative="less").pvalue < CHANCE
    needed = binom.isf(CHANCE, n, chance) + 1
    if p > CHANCE and not below and binom.sf(needed - 1, n, (1 + chance) / 2) < 0.9:
        return Check(name, None, None, CHANCE, "too few images, or classes among them, to tell it from a guess")
    return Check.at_most(name, p, CHANCE, says)


def _chance(y: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Expected accuracy of predictions that are assigned to the images at random."""
    return float(sum((y == k).mean() * (prediction == k).mean() for k in np.unique(y)))


def classes_in_order(verdicts: Verdicts) -> Check:
    """The labels count the classes as the network does: no other order of them makes more images right.

    For each half of the images the order is the one that fits the other half best, so that it is not fitted to itself.
    """
    says = "share of images that another order of the classes makes right"
    y, prediction = verdicts.y.cpu().numpy(), verdicts.prediction.cpu().numpy()
    half = np.zeros(len(y), dtype=bool)
    for k in np.unique(y):
        half[np.flatnonzero(y == k)[::2]] = True
    expected = np.empty_like(y)
    for rows in (half, ~half):
        expected[rows] = _best_order(y[~rows], prediction[~rows], verdicts.classes)[y[rows]]
    right, mapped = y == prediction, expected == prediction
    only_mapped, only_right, p = mcnemar(mapped.tolist(), right.tolist())
    gain = (only_mapped - only_right) / len(y)
    if gain <= 0 or p > SURE or mapped[expected != y].mean() < 0.5:  # confused classes are not another order
        return Check.at_most("classes in the network's order", 0.0, 0.0, says)
    order = _best_order(y, prediction, verdicts.classes)
    named = [text for text, other in _orders(verdicts.classes).items() if (other[y] == prediction).mean() >= mapped.mean() - POINT]
    moved = [f"{k} is its {order[k]}" for k in np.unique(y) if order[k] != k]
    message = f"{says}: it looks as if {named[0] if named else 'label ' + few(moved)}; give the classes in the network's order"
    return Check.at_most("classes in the network's order", gain, 0.0, message)


def _best_order(y: NDArray[Any], prediction: NDArray[Any], classes: int) -> NDArray[Any]:
    """The network's class for each label, so that as many predictions as possible are right; an absent label keeps its own."""
    order = np.arange(classes)
    known = prediction != NO_CLASS
    seen, place = np.unique(np.concatenate([y[known], prediction[known]]), return_inverse=True)
    if not len(seen):
        return order
    n, here = len(seen), np.arange(len(seen))
    label, given = place[: len(place) // 2], place[len(place) // 2 :]
    # ties: unchanged; and an extra column for each label whose class another one takes
    weight = np.concatenate([np.ones(len(label)), np.full(n, 0.5), np.full(n, 0.1 / n)])
    rows, columns = np.concatenate([label, here, here]), np.concatenate([given, here, n + here])
    matching = min_weight_full_bipartite_matching(csr_array((weight, (rows, columns)), shape=(n, 2 * n)), maximize=True)[1]
    matching[matching >= n] = np.setdiff1d(here, matching)
    order[seen] = seen[matching]
    return order


def _orders(classes: int) -> dict[str, NDArray[Any]]:
    """Common orders, by description: the network's class for each label."""
    here = np.arange(classes)
    orders: dict[str, NDArray[Any]] = {}
    for first in (0, 1):
        text = np.array(sorted(range(first, classes + first), key=str)) - first  # 0, 1, 10, 11, 2, ...
        counted = f'numbers from {first} were sorted as text ("10" before "2")'
        orders |= {f"{counted} for the labels": text, f"{counted} for the network": text.argsort()}
    return orders | {
        "labels are counted from 1, the network's classes from 0": here - 1,
        "labels are counted from 0, the network's classes from 1": here + 1,
        "labels are in the reverse order": here[::-1],
    }


READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels in [-1, 1]": internal_from_unit,
    "pixels in [0, 255]": lambda x: x * 255,
    "each channel standardised": lambda x: (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp_min(1e-6),
    "channels in the reverse order (BGR)": lambda x: x.flip(1),
    "inverted pixels": lambda x: 1 - x,
    "rows as columns": lambda x: x.transpose(2, 3),
}


def usual_images(model: nn.Module, x: Tensor, y: Tensor, settings: AttackSettings) -> Check:
    """The network reads RGB in [0, 1]: no other convention makes significantly more images right. Shapes as for `run`."""
    name, says = "images as the network reads them", "points of accuracy that another reading of the images adds"
    x, y = x[:READ_ANEW], y[:READ_ANEW]
    right = predictions(model, x, settings.batch_size) == y
    best, better = 0.0, ""
    for reading, read in READINGS.items():
        if x.shape[2] != x.shape[3] and reading == "rows as columns":
            continue
        prediction = predictions(model, read(x), settings.batch_size)
        only_other, only_right, p = mcnemar((prediction == y).tolist(), right.tolist())
        gain, truth = (only_other - only_right) / len(y), y.cpu().numpy()
        guess = _chance(truth, prediction.cpu().numpy())
        if gain > best and p < SURE and binomtest(int((prediction == y).sum()), len(y), guess, alternative="greater").pvalue < CHANCE:
            best, better = gain, f": {reading}"
    return Check.at_most(name, best, POINT, f"{says}{better}")


def sweep(model: nn.Module, x: Tensor, y: Tensor, settings: AttackSettings) -> list[tuple[float, float]]:
    """(radius, accuracy under PGD) at 0, at multiples of the standard protocol's radius, and at one that reaches every image."""
    protocol = settings.standard
    large = LARGE if protocol.norm == "Linf" else LARGE * x[0].numel() ** 0.5
    radii = sorted({protocol.radius * factor for factor in settings.checks.sweep if protocol.radius * factor < large} | {large})
    curve = [(0.0, _accuracy(model, x, y))]
    for radius in radii:
        step = min(radius * protocol.pgd_step / protocol.radius, 1.0)
        curve.append((radius, _under_pgd(model, x, y, settings, radius, step, protocol.pgd.steps, [0])))
    return curve


def falls(curve: Sequence[tuple[float, float]]) -> Check:
    """Robust accuracy falls as the radius grows. curve: of `sweep`."""
    value = max(later[1] - earlier[1] for earlier, later in itertools.pairwise(curve))
    return Check.at_most("accuracy falls with the radius", value, POINT, "largest rise from one radius to the next")


def reaches_chance(curve: Sequence[tuple[float, float]], classes: int) -> Check:
    """At a radius that reaches every image, accuracy is that of a guess, or less. curve: of `sweep`."""
    radius, accuracy = curve[-1]
    return Check.at_most("accuracy reaches chance", accuracy, 1 / classes, f"accuracy at radius {radius:.3g}")


def more_effort(model: nn.Module, x: Tensor, y: Tensor, settings: AttackSettings) -> Check:
    """PGD with more steps and restarts breaks hardly more images."""
    protocol, checks = settings.standard, settings.checks
    usual = _under_pgd(model, x, y, settings, protocol.radius, protocol.pgd_step, protocol.pgd.steps, [0])
    restarts = list(range(checks.restarts))
    harder = _under_pgd(model, x, y, settings, protocol.radius, protocol.pgd_step, checks.steps, restarts)
    value = usual - harder
    says = f"points of accuracy that PGD-{checks.steps} with {checks.restarts} restarts takes beyond PGD-{protocol.pgd.steps}"
    return Check.at_most("more steps and restarts do not help", value, POINT, says)


def transfer(model: nn.Module, source: nn.Module | None, x: Tensor, y: Tensor, settings: AttackSettings, verdicts: Verdicts) -> Check:
    """PGD's examples of another model are weaker here than this model's own. verdicts: of the standard protocol, on x and beyond."""
    name = "a transferred attack is weaker"
    if source is None:
        return Check(name, None, None, 0.0, "no other model was given")
    protocol = settings.standard
    with fp32_eval_copy(source) as other:
        moved = pgd_batch(other, x, y, protocol, pgd_start(x, 0, protocol, settings.seed))
    transferred = _share(predictions(model, moved, settings.batch_size) == y)
    own = _share(verdicts.robust_under([pgd_name(protocol)])[: len(x)])
    return Check.at_most(name, own - transferred, 0.0, "accuracy under the own attack less that under the transferred one")


def own_flags(protocol: ProtocolSettings, verdicts: Verdicts) -> Check:
    """What AutoAttack's own checks warned of."""
    name = "AutoAttack's own checks"
    if not protocol.n:
        return Check(name, None, None, 0.0, "no ensemble was run")
    return Check.at_most(name, len(verdicts.flags), 0.0, "; ".join(verdicts.flags) or "warnings")


def run(
    model: nn.Module, x: Tensor, y: Tensor, settings: AttackSettings, verdicts: dict[str, Verdicts], source: nn.Module | None
) -> dict[str, Any]:
    """Every check, on the first n images; those of one protocol carry its name.

    x: images (N, C, H, W) in [0, 1]; y: labels; verdicts: by protocol; source: the network that a
    transferred attack is made on. Returns {"checks": [...], "checks_failed": how many, "sweep": [[radius, accuracy], ...]}.
    """
    everything = x, y
    x, y, standard = x[: settings.checks.n], y[: settings.checks.n], settings.standard
    with fp32_eval_copy(model) as network:
        reading = usual_images(network, *everything, settings)
        curve = sweep(network, x, y, settings)
        with torch.no_grad():
            classes = network(x[:1]).shape[1]
        of_network = [
            deterministic(network, x),
            logits_not_probabilities(network, x),
            gradients(network, x, y, standard, settings.seed),
            falls(curve),
            reaches_chance(curve, classes),
            more_effort(network, x, y, settings),
            transfer(network, source, x, y, settings, verdicts[STANDARD]),
        ]
    rows = [{**asdict(check), "protocol": None, "n": len(x)} for check in of_network]
    whole = [above_chance(verdicts[STANDARD]), classes_in_order(verdicts[STANDARD]), reading]
    n_whole = (*[len(everything[0])] * 2, min(len(everything[0]), READ_ANEW))
    rows += [{**asdict(check), "protocol": None, "n": n} for check, n in zip(whole, n_whole, strict=True)]
    for name, protocol in settings.protocols.items():
        of_protocol = [check(protocol, verdicts[name]) for check in (finite, inside, black_box, own_flags)]
        n = (*[len(verdicts[name].y)] * 2, protocol.n, protocol.n)
        rows += [{**asdict(check), "protocol": name, "n": size} for check, size in zip(of_protocol, n, strict=True)]
    return {"checks": rows, "checks_failed": sum(row["passed"] is False for row in rows), "sweep": [list(point) for point in curve]}


def _share(which: Tensor) -> float:
    return int(which.sum()) / len(which)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return _share(predictions(model, x, len(x)) == y)


def _under_pgd(
    model: nn.Module, x: Tensor, y: Tensor, settings: AttackSettings, radius: float, step: float, steps: int, restarts: Sequence[int]
) -> float:
    """Accuracy after PGD of these settings, the worst of the restarts for each image."""
    protocol = settings.standard.model_copy(update={"eps": radius, "pgd": PGDSettings.model_construct(steps=steps, step_size=step)})
    robust = predictions(model, x, settings.batch_size) == y
    for restart in restarts:
        for part in batches(len(x), settings.batch_size):
            start = pgd_start(x[part], part.start, protocol, settings.seed, restart)
            moved = pgd_batch(model, x[part], y[part], protocol, start)
            robust[part] &= predictions(model, moved, settings.batch_size) == y[part]
    return _share(robust)
