"""Clean accuracy, PGD-20 and AutoAttack standard, in fp32 and eval mode, on images in [0, 1]."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ebjdat.data.batches import DeviceData, generator
from ebjdat.errors import UserError
from ebjdat.models.modes import moving_images
from ebjdat.params import AttackSettings, ProtocolSettings
from ebjdat.pixels import UNIT, unit_distance
from ebjdat.progress import Bar
from ebjdat.samplers.pgd import cross_entropy_score, projected_gradient, random_point

PGD_STEPS = 20
FEWEST_CLASSES = 4  # below, the targeted DLR loss is not defined


class AttackError(UserError):
    """An attack cannot be run, or what it returned must not be reported."""


def batches(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Predicted classes (N,) of images (N, C, H, W) in [0, 1]."""
    return torch.cat([model(x[part]).argmax(1) for part in batches(len(x), batch_size)])


def pgd_examples(
    model: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings, seed: int, batch_size: int, bar: Bar | None = None
) -> Tensor:
    """PGD-n on cross-entropy from a random start (Madry et al. 2018): adversarial images in [0, 1], all of one restart.

    x: images of the protocol (noise, if it has any, already on them). The same settings, images and weights give the same
    examples; a batch's start depends on its place only.
    """
    found = []
    with moving_images(model, "eval"):
        for part in batches(len(x), batch_size):
            start = random_point(x[part], protocol.radius, protocol.norm, UNIT, generator(x.device, "pgd", seed, part.start))
            found.append(
                projected_gradient(
                    cross_entropy_score(model, x[part], y[part]),
                    x[part],
                    eps=protocol.radius,
                    step_size=protocol.pgd_step,
                    steps=protocol.pgd.steps,
                    norm=protocol.norm,
                    bounds=UNIT,
                    start=start,
                )
            )
            if bar:
                bar.advance(part.stop - part.start)
    return torch.cat(found)


def seen_under(protocol: ProtocolSettings, x: Tensor, seed: int) -> Tensor:
    """Images in [0, 1] as the protocol shows them to the network: with its noise, the same for every network; not clamped, as released."""
    if not protocol.noise:
        return x
    noise = torch.randn(x.shape, generator=generator(x.device, "protocol noise", seed), device=x.device)
    return x + unit_distance(protocol.noise) * noise


def autoattack_examples(model: nn.Module, x: Tensor, y: Tensor, settings: AttackSettings) -> tuple[Tensor, list[str]]:
    """AutoAttack standard (Croce & Hein 2020, arXiv 2003.01690) through pyautoattack: APGD-CE, APGD-T, FAB-T, Square.

    Targeted attacks aim at 9 classes, or at all others when there are fewer. Returns adversarial images in [0, 1] and
    the warnings that the ensemble's own checks gave (randomised output, vanishing gradients, ...). Raises AttackError
    below 4 classes.
    """
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if classes < FEWEST_CLASSES:
        raise AttackError(
            f"AutoAttack standard needs at least {FEWEST_CLASSES} classes, here are {classes}; set evaluation.attack.autoattack.n to 0"
        )

    log = logging.getLogger("auto-attack")
    heard = _Collect()
    log.addHandler(heard)
    old_level, log.propagate = log.level, False
    log.setLevel(logging.DEBUG)
    try:
        with moving_images(model, "eval"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack = AutoAttack(model, norm=settings.norm, eps=settings.eps, seed=settings.seed, version="standard", device=x.device)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
            adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=settings.autoattack.batch_size)
    finally:
        log.removeHandler(heard)
        log.propagate = True
        log.setLevel(old_level)
    return adversarial, heard.warnings


class _Collect(logging.Handler):
    """Prints the ensemble's progress, keeps its warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.warnings.append(message)
        if "robust accuracy after" in message or record.levelno >= logging.WARNING:
            print(f"autoattack: {message}", flush=True)


def within(adversarial: Tensor, x: Tensor, settings: AttackSettings, slack: float = 1e-5) -> bool:
    """Whether every adversarial image lies in the eps-ball and in [0, 1], up to float rounding."""
    delta = (adversarial - x).flatten(1)
    size = delta.abs().amax(1) if settings.norm == "Linf" else delta.norm(dim=1)
    inside = (size <= settings.eps + slack).all() and adversarial.min() >= UNIT[0] and adversarial.max() <= UNIT[1]
    return bool(inside)


def attack(model: nn.Module, data: DeviceData, settings: AttackSettings, title: str = "attack") -> dict[str, Any]:
    """Clean accuracy and PGD-20 on all of `data`, AutoAttack standard on its first n; counts beside every fraction.

    Raises AttackError when an attack returned images outside its budget: such a number must not be reported.
    """
    x, y = data.unit(), data.labels
    n = min(settings.autoattack.n, len(x))
    with Bar(f"{title}: PGD-{PGD_STEPS}", len(x)) as bar:
        clean = predictions(model, x, settings.batch_size) == y
        moved = pgd_examples(model, x, y, settings, bar)
        survived = predictions(model, moved, settings.batch_size) == y
        _require(within(moved, x, settings), "PGD")
        bar.line(f"clean {clean.float().mean():.1%}, PGD-{PGD_STEPS} {survived.float().mean():.1%} (n = {len(x)})")
    result: dict[str, Any] = {
        "norm": settings.norm,
        "eps": settings.eps,
        "n_test": len(x),
        **_counted("clean", clean),
        **_counted("pgd20", survived & clean),
        "n_attack": n,
    }
    if n:
        with Bar(f"{title}: AutoAttack", n) as bar:
            moved, warned = autoattack_examples(model, x[:n], y[:n], settings)
            _require(within(moved, x[:n], settings), "AutoAttack")
            standing = (predictions(model, moved, settings.batch_size) == y[:n]) & clean[:n]
            bar.advance(n)
            bar.line(f"AutoAttack standard {standing.float().mean():.1%} (n = {n})")
        result |= _counted("autoattack", standing)
        result |= {"pgd20_acc_first_n": int((survived & clean)[:n].sum()) / n, "autoattack_warnings": warned}
    return result


def _counted(name: str, correct: Tensor) -> dict[str, Any]:
    """How many of (N,) are correct, and the fraction."""
    count = int(correct.sum())
    return {f"{name}_correct": count, f"{name}_acc": count / len(correct)}


def _require(held: bool, name: str) -> None:
    if not held:
        raise AttackError(f"{name} returned images outside its budget or outside [0, 1]; its accuracy is not reported")
