"""Context managers and wrappers that change how a network is used, and restore it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ebjdat.errors import AttackError, UserError, in_a_line
from ebjdat.pixels import internal_from_unit, unit_from_internal

NO_GRADIENT = "the network passes no gradient on to its input (detach, no_grad or NumPy inside); gradient attacks cannot run"


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm's running statistics stay as they are, whatever is run in train mode."""
    norms = [(m, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for m, _ in norms:
            m.track_running_stats = False  # in eval mode they are used all the same
        yield
    finally:
        for m, tracked in norms:
            m.track_running_stats = tracked


@contextlib.contextmanager
def repeated(model: nn.Module) -> Iterator[None]:
    """Batch norm's running statistics stay as they are, but are saved for the backward pass as in the pass that is repeated."""
    norms = [(m, m.momentum, m.num_batches_tracked) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for m, _, _ in norms:
            m.momentum, m.num_batches_tracked = 0.0, None
        yield
    finally:
        for m, momentum, count in norms:
            m.momentum, m.num_batches_tracked = momentum, count


@contextlib.contextmanager
def elementary_norms(model: nn.Module) -> Iterator[None]:
    """Batch norm in train mode by elementary operations, for derivatives in forward mode that are differentiated once more.

    torch's own operation has the right derivatives along a direction, but takes the batch's statistics in them for constants, so that
    their gradients are wrong; in bf16 it mixes precisions.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for m in norms:
            m.forward = partial(_elementary, m)  # type: ignore[method-assign]
        yield
    finally:
        for m in norms:
            vars(m).pop("forward", None)


def _elementary(m: _BatchNorm, x: Tensor) -> Tensor:
    if not m.training:
        return type(m).forward(m, x)
    with torch.no_grad():
        type(m).forward(m, forward_ad.unpack_dual(x).primal)  # for its running statistics alone
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    over, shape = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    h = h - h.mean(over, keepdim=True)
    h = h * (h.square().mean(over, keepdim=True) + m.eps).rsqrt()
    return (h * m.weight.view(shape) + m.bias.view(shape)).to(x.dtype)


@contextlib.contextmanager
def frozen_parameters(model: nn.Module, mode: str, update_statistics: bool = False) -> Iterator[None]:
    """No gradients for parameters; mode "eval", or "train" (statistics of the batch), which counts in running statistics if asked.

    All else is restored on leaving, also after an error.
    """
    modes = [(m, m.training) for m in model.modules()]
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.train(mode == "train")
        for p, _ in parameters:
            p.requires_grad_(False)
        with contextlib.nullcontext() if update_statistics else frozen_statistics(model):
            yield
    finally:
        for p, requires_grad in parameters:
            p.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode is restored on leaving."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Layers in bf16 for precision "bf16", else as they are.

    Not for code that changes weights between two forward passes: autocast remembers their bf16 copies until it is left.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def tensor_cores(precision: str) -> Iterator[None]:
    """A GPU's fp32 products in TF32 where `precision` is "tf32"; restored on leaving."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        if precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class UnitRange(nn.Module):
    """A network of the internal range as evaluation and other programs see it: images in [0, 1] -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(internal_from_unit(x))
        return logits


class InternalRange(nn.Module):
    """A network of images in [0, 1] as training sees it: images in [-1, 1] -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(unit_from_internal(x))
        return logits


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps results of its last pass (weight_norm, spectral_norm), which deepcopy refuses.

    Raises whatever a part raises that cannot be copied.
    """
    kept = [value for module in model.modules() for value in _tensors(vars(module)) if not value.is_leaf]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept}
    return copy.deepcopy(model, memo)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class Guarded(nn.Module):
    """Any network, as attacks call it: images (N, C, H, W) -> its logits (N, K), fp32.

    It gets a copy of the images, so that a network that works in place changes nothing. An image whose gradient is not finite gets
    a zero one, so that attacks leave it where it is instead of at NaN. What is raised inside, also in its backward pass,
    becomes an AttackError, and so does outputs that are not one row of logits per image, of constant length.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.classes: int | None = None  # K, once it was called

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            logits: Tensor = _Backward.apply(x, self)
            return logits
        return self.of(x.clone())

    def of(self, x: Tensor) -> Tensor:
        """Logits of images that the network may change."""
        where = f"images of shape {tuple(x.shape)}, in [0, 1]"
        try:
            logits = self.network(x)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise AttackError(f"the network failed on {where}: {in_a_line(error)}") from error
        count = "one image" if len(x) == 1 else f"{len(x)} images"
        if not isinstance(logits, Tensor):
            raise AttackError(f"the network returned {type(logits).__name__} for {count}; logits of shape ({len(x)}, classes) are needed")
        if logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point() or logits.layout != torch.strided:
            kind = "" if logits.is_floating_point() and logits.layout == torch.strided else f" of {logits.dtype}".replace("torch.", "")
            output = f"a tensor{kind} of shape {tuple(logits.shape)}"
            raise AttackError(f"the network returned {output} for {count}; logits of shape ({len(x)}, classes) are needed")
        if self.classes not in (None, logits.shape[1]):
            raise AttackError(f"the network returned {logits.shape[1]} logits for each of {count}, and {self.classes} before")
        self.classes = logits.shape[1]
        return logits.as_subclass(Tensor).float()


class _Backward(torch.autograd.Function):
    """A Guarded network with its own graph, so that an error of its backward pass is known to be the network's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, network: Guarded) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_(True)
            ctx.logits = network.of(ctx.x.clone())
        if not ctx.logits.requires_grad:
            raise AttackError(NO_GRADIENT)
        return ctx.logits.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        try:  # the graph is kept, since attacks ask once for each class
            (gradient,) = torch.autograd.grad(ctx.logits, ctx.x, given, retain_graph=True, allow_unused=True)
        except (Exception, SystemExit) as error:
            raise AttackError(f"no gradient can be taken through the network: {in_a_line(error)}") from error
        if gradient is None:
            raise AttackError(NO_GRADIENT)
        return _zero_unless_finite(gradient), None


def _zero_unless_finite(gradient: Tensor) -> Tensor:
    finite = torch.isfinite(gradient).flatten(1).all(1)
    return gradient.where(finite.view(-1, *[1] * (gradient.ndim - 1)), 0)
