"""One training step: samples, loss, update, in the settings' precision and slices. The loop and measurements of speed call it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.data.batches import Batch, share
from ebjdat.models.modes import autocast, tensor_cores
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.sampling import SamplingState
from ebjdat.settings import TrainingSettings


@cache
def compiled_trunk() -> Callable[[WideResNet, Tensor], Tensor]:
    """The trunk through torch.compile; where that fails, torch says so once and runs it as it is (in this whole process)."""
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64  # one program for each mode, precision and shape; beyond, none is compiled
    return torch.compile(WideResNet.trunk, dynamic=False)


@dataclass(frozen=True)
class Step:
    """What a method does with a batch. Nothing in it waits for the device."""

    method: str
    settings: TrainingSettings
    model: WideResNet
    optimizer: torch.optim.Optimizer

    def sample(self, batch: Batch, state: SamplingState, noise: torch.Generator, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Chains and adversarial neighbours, as the method wants them (or only these): name -> (B, C, H, W) in [-1, 1]."""
        found: dict[str, list[Tensor]] = {}
        slices = self.settings.compute.accumulate
        for i in range(slices):
            chains = None if state.chains is None else state.chains.part(i, slices)
            part, of_part = batch.part(i, slices), replace(state, chains=chains)
            for name in registry.METHODS[self.method].samples if only is None else only:
                sample = registry.load(registry.SAMPLES, name)
                with self.computing(), autocast(batch.x.device, self._precision):
                    found.setdefault(name, []).append(sample(self.model, part, of_part, noise))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}

    def update(self, batch: Batch, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change the weights once; returns the loss's terms, detached, means over the batch."""
        loss = registry.load(registry.METHODS, self.method)
        update = registry.load(registry.UPDATES, self.settings.update.name)

        slices = self.settings.compute.accumulate

        def on(i: int) -> dict[str, Tensor]:
            part = {name: share(value, i, slices) for name, value in drawn.items()}
            with autocast(batch.x.device, self._precision):
                terms: dict[str, Tensor] = loss(self.model, batch.part(i, slices), part, self.settings.weights)
            return terms

        closures = [partial(on, i) for i in range(slices)]
        with self.computing():
            terms: dict[str, Tensor] = update(self.model, self.optimizer, closures, self.settings.update)
        return terms

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """While a step is computed: its precision, compiled, blocks recomputed, as the settings ask; else the network is as it was."""
        compute, model = self.settings.compute, self.model
        try:
            model.recompute = compute.recompute
            if compute.compile:
                model.trunk = partial(compiled_trunk(), model)  # type: ignore[method-assign]
            with tensor_cores(self._precision):
                yield
        finally:
            model.recompute = False
            vars(model).pop("trunk", None)

    @property
    def _precision(self) -> str:
        return self.settings.compute.precision
