"""Adapter to pyautoattack: the attacks of AutoAttack, each one call of its own code, on a network that costs less per query.

An attack is `attack(network, x, y, settings, protocol, seed) -> images`: x (B, C, H, W) in [0, 1], y (B,), adversarial images
like x where one was found, else anything. The caller classifies the images again; nothing here decides a verdict.
Attacks use random numbers in the same order as in pyautoattack, so the same batches give the same starts.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyautoattack import checks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from ebjdat.errors import AttackError
from ebjdat.models.modes import copied
from ebjdat.pixels import internal_distance, internal_from_unit, unit_from_internal
from ebjdat.settings import EnsembleSettings, ProtocolSettings

PIXELS_AT_ONCE = 65_536  # on a CPU; more images in one pass leave its caches
CLEAR = 4.0  # a decision of bf16 counts where its margin exceeds the largest observed error by this factor
TIE = 1e-6  # of the largest logit; a smaller margin decides nothing
SLACK = 1e-5  # float rounding of distances
TARGETED = ("apgd_t", "fab_t")
LOG = logging.getLogger("ebjdat.autoattack")


class FastNetwork(nn.Module):
    """A network for searching: the same function, arranged to cost less. Images (B, C, H, W) in [0, 1] -> logits (B, K) in fp32.

    Channels last where the network allows it, no gradients for parameters, passes that fit a CPU's caches. With `bf16`, the
    network runs in bf16, and where a prediction is not clear of bf16's error (calibrated on `x`), without gradients, again in
    fp32: argmax of the logits is fp32's.
    """

    def __init__(self, model: nn.Module, x: Tensor, bf16: bool = False) -> None:
        super().__init__()
        self.layout = torch.contiguous_format
        try:
            self.model, own = copied(model).eval().requires_grad_(False), True
        except Exception:  # a part that cannot be copied: the network itself is used
            self.model, own = model, False
        self.at_once = max(1, PIXELS_AT_ONCE // (x.shape[-2] * x.shape[-1])) if x.device.type == "cpu" else 1 << 30
        self.bf16 = bf16
        self.count: Callable[[int], None] | None = None  # gets the number of images of each pass
        self.clear = 0.0
        if own and self._allows_channels_last(model, x[:2]):
            self.model, self.layout = self.model.to(memory_format=torch.channels_last), torch.channels_last
        if bf16:
            with torch.no_grad():
                part = x[: self.at_once]
                self.clear = CLEAR * float((self._logits(part, True) - self._logits(part, False)).abs().max())

    def _allows_channels_last(self, model: nn.Module, x: Tensor) -> bool:
        """Whether the network gives the same logits and a gradient in that layout; some use views that it does not allow."""
        points = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(True)
        try:
            probe = copied(self.model).to(memory_format=torch.channels_last)
            with torch.enable_grad():
                logits = probe(points)
                torch.autograd.grad(logits.sum(), points, allow_unused=True)
            with torch.no_grad():
                return torch.allclose(logits, model(x), rtol=1e-3, atol=1e-4)
        except (RuntimeError, AttackError):
            return False

    def _logits(self, x: Tensor, bf16: bool) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)  # pyautoattack views gradients as rows
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            parts = [self.model(part.contiguous(memory_format=self.layout)) for part in x.split(self.at_once)]
        return torch.cat(parts).float()

    def along_boundaries(self, x: Tensor) -> Tensor:
        """For an attack that moves along decision boundaries: there bf16 would leave nearly every decision to fp32."""
        if x.requires_grad or not self.bf16:
            return self(x)
        if self.count:
            self.count(len(x))
        return self._logits(x, False)

    def forward(self, x: Tensor) -> Tensor:
        if self.count:
            self.count(len(x))
        logits = self._logits(x, self.bf16)
        return logits if logits.requires_grad else self.decided(x, logits)

    @torch.no_grad()
    def decided(self, x: Tensor, logits: Tensor) -> Tensor:
        """These logits without gradient; where bf16 is unclear, those of fp32."""
        logits = logits.detach()
        if not self.bf16:
            return logits
        best = logits.topk(2, dim=1).values
        unclear = (best[:, 0] - best[:, 1] < self.clear).nonzero().squeeze(1)
        return logits.index_copy(0, unclear, self._logits(x[unclear], False)) if len(unclear) else logits


def surely_broken(logits: Tensor, y: Tensor) -> Tensor:
    """Where logits (B, K) are of another class than y (B,), or not finite: (B,).

    By more than another layout or batch can change: the verdict must find it broken, too.
    """
    wrong = logits.amax(1) - logits.gather(1, y[:, None]).squeeze(1) > TIE * logits.abs().amax(1)
    return wrong | ~torch.isfinite(logits).all(1)


class _AllBrokenError(Exception):
    """Every example of the run is broken; its remaining steps are unnecessary."""


class _SkipBroken(nn.Module):
    """What one run of APGD queries: the network does not compute examples that are broken.

    APGD keeps every point in the ball, so the first misclassified one decides an example. It gets its last logits from then
    on, without gradient, which changes nothing for the others.
    """

    def __init__(self, network: FastNetwork, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.network, self.y = network, y
        self.adversarial, self.robust = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.robust.nonzero().squeeze(1)
        fresh = self.network(x[rows])
        logits = fresh if self.last is None else self.last.index_copy(0, rows, fresh)
        self.last = logits.detach()
        with torch.no_grad():
            broken = rows[surely_broken(self.network.decided(x[rows], fresh), self.y[rows])]
            self.adversarial[broken] = x[broken].detach()
            self.robust[broken] = False
        if not self.robust.any():
            raise _AllBrokenError
        return logits


class _NoteNotFinite(nn.Module):
    """What an attack queries that cannot continue with logits that are not finite: it sees zeros instead.

    Zeros would be a class, perhaps the right one. So the examples in whose ball such a point lies are noted: they are broken.
    """

    def __init__(self, query: Callable[[Tensor], Tensor], x: Tensor, protocol: ProtocolSettings) -> None:
        super().__init__()
        self.query, self.x, self.protocol = query, x, protocol
        self.noted: dict[int, Tensor] = {}  # row of x -> a point in its ball and in [0, 1]

    def forward(self, points: Tensor) -> Tensor:
        logits = self.query(points)
        finite = torch.isfinite(logits).all(1)
        if finite.all():
            return logits
        for point in points.detach()[~finite]:
            if len(self.noted) < len(self.x) and point.amin() >= 0 and point.amax() <= 1:
                delta = (self.x - point).flatten(1)
                size = delta.abs().amax(1) if self.protocol.norm == "Linf" else delta.norm(dim=1)
                for row in (size <= self.protocol.radius + SLACK).nonzero().flatten().tolist():
                    self.noted.setdefault(row, point)
        return logits.where(finite[:, None], 0)

    def merged(self, adversarial: Tensor) -> Tensor:
        """The images that the attack returned, with those that were noted."""
        adversarial = adversarial.clone()
        for row, point in self.noted.items():
            adversarial[row] = point
        return adversarial


class _SkippingBroken:
    """Mixed into pyautoattack's APGD: its steps compute only examples that are not broken yet."""

    model: Any  # FastNetwork; _SkipBroken during a run

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        network = self.model
        watched = _SkipBroken(network, x, y)
        self.model = watched
        try:
            with contextlib.suppress(_AllBrokenError):
                super().attack_single_run(x, y, x_init)  # type: ignore[misc]
        finally:
            self.model = network
        return x, watched.robust, torch.zeros(len(x), device=x.device), watched.adversarial


class _FastAPGD(_SkippingBroken, APGDAttack):  # type: ignore[misc]
    pass


class _FastTargetedAPGD(_SkippingBroken, APGDAttack_targeted):  # type: ignore[misc]
    pass


def apgd_ce(network: FastNetwork, x: Tensor, y: Tensor, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """APGD on cross-entropy, one random start."""
    return _apgd(network, x, y, "ce", settings, protocol, seed)


def apgd_dlr(network: FastNetwork, x: Tensor, y: Tensor, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """APGD on the untargeted difference-of-logits ratio, one random start; at least 3 classes."""
    return _apgd(network, x, y, "dlr", settings, protocol, seed)


def _apgd(
    network: FastNetwork, x: Tensor, y: Tensor, loss: str, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int
) -> Tensor:
    attack = _FastAPGD(network, loss=loss, n_iter=settings.steps, **_common(x, protocol, seed), logger=LOG)
    with own_randomness():
        return attack.perturb(x, y)


def apgd_t(network: FastNetwork, x: Tensor, y: Tensor, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """APGD on the targeted difference-of-logits ratio, a run per target class; at least 4 classes."""
    targets = aimed_at(settings, _classes(network, x))
    attack = _FastTargetedAPGD(network, n_iter=settings.steps, n_target_classes=targets, **_common(x, protocol, seed), logger=LOG)
    with own_randomness():
        return attack.perturb(x, y)


def fab(network: FastNetwork, x: Tensor, y: Tensor, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """FAB towards the nearest class. range internal: on pixels in [-1, 1], clipped to [0, 1] of that range, as in the released code."""
    return _fab(network, x, y, False, settings, protocol, seed)


def fab_t(network: FastNetwork, x: Tensor, y: Tensor, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """FAB, a run per target class; `range` as for `fab`."""
    return _fab(network, x, y, True, settings, protocol, seed)


def _fab(
    network: FastNetwork, x: Tensor, y: Tensor, targeted: bool, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int
) -> Tensor:
    common = _common(x, protocol, seed)
    common |= {"n_iter": settings.steps, "targeted": targeted, "n_target_classes": aimed_at(settings, _classes(network, x))}
    noting = _NoteNotFinite(network.along_boundaries, x, protocol)
    if settings.range == "unit":
        with own_randomness():
            return noting.merged(FABAttack_PT(noting, **common).perturb(x, y))
    common["eps"] = internal_distance(protocol.radius)
    start = internal_from_unit(x)
    with own_randomness():
        moved = FABAttack_PT(lambda z: noting(unit_from_internal(z)), **common).perturb(start, y)
    changed = (moved != start).flatten(1).any(1).view(-1, 1, 1, 1)
    return noting.merged(torch.where(changed, unit_from_internal(moved), x))  # images without an adversarial one stay bit for bit


def square(network: FastNetwork, x: Tensor, y: Tensor, settings: EnsembleSettings, protocol: ProtocolSettings, seed: int) -> Tensor:
    """Square: random search without gradients."""
    noting = _NoteNotFinite(network, x, protocol)
    attack = SquareAttack(noting, p_init=0.8, n_queries=settings.queries, resc_schedule=False, **_common(x, protocol, seed))
    with own_randomness():
        return noting.merged(attack.perturb(x, y))


def queries(name: str, settings: EnsembleSettings, classes: int) -> int:
    """At most how many images an attack shows the network per example; for progress."""
    targets = aimed_at(settings, classes)
    steps = settings.steps + 3
    return {
        "apgd_ce": steps,
        "apgd_dlr": steps,
        "apgd_t": targets * steps + 2,
        "fab": 2 * steps,
        "fab_t": targets * 2 * steps + 2,
        "square": settings.queries + 2,
    }[name]


def aimed_at(settings: EnsembleSettings, classes: int) -> int:
    """How many classes a targeted attack aims at."""
    return min(settings.targets, classes - 1)


def _common(x: Tensor, protocol: ProtocolSettings, seed: int) -> dict[str, Any]:
    return {"norm": protocol.norm, "eps": protocol.radius, "n_restarts": 1, "seed": seed, "verbose": False, "device": x.device}


@torch.no_grad()
def _classes(network: nn.Module, x: Tensor) -> int:
    return int(network(x[:1]).shape[1])


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """pyautoattack seeds torch's global generator; it is restored on leaving."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def flags(network: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings) -> list[str]:
    """Warnings of AutoAttack's own checks on these examples: randomised, probabilities for logits, gradients taken inside, classes."""
    with collected_warnings() as messages:
        checks.check_randomized(network, x, y, bs=len(x), logger=LOG)
        classes = checks.check_range_output(network, x, logger=LOG)
        _check_dynamic(network, x)
        targets = {name: aimed_at(a, classes) for name, a in protocol.attacks.items()}
        names = [name.replace("_", "-") for name in protocol.attacks]  # as pyautoattack calls them
        checks.check_n_classes(classes, names, targets.get("apgd_t", 0), targets.get("fab_t", 0), logger=LOG)
    return messages


def _check_dynamic(network: nn.Module, x: Tensor) -> None:
    """pyautoattack's check counts calls of all networks so far, and ends any other tracing (a debugger's, coverage's)."""
    tracer = sys.gettrace()
    for name in checks.funcs:
        checks.funcs[name] = 0
    try:
        checks.check_dynamic(network, x, False, logger=LOG)
    finally:
        sys.settrace(tracer)


def square_flag(accuracies: dict[str, float]) -> list[str]:
    """AutoAttack's own warning when Square still lowers the accuracy that white-box attacks left. accuracies: after each attack."""
    with collected_warnings() as messages:
        checks.check_square_sr(accuracies, logger=LOG)
    return messages


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.messages:
            self.messages.append(message)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings of AutoAttack's code inside, each once."""
    collect, propagate = _Collect(), LOG.propagate
    LOG.addHandler(collect)
    LOG.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield collect.messages
    finally:
        LOG.removeHandler(collect)
        LOG.propagate = propagate
