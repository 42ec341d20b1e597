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
from ebjdat.objectives.terms import MethodState, Terms
from ebjdat.settings import TrainingSettings
from ebjdat.training.updates import When


@cache
def compiled_trunk() -> Callable[[WideResNet, Tensor], Tensor]:
    """The trunk through torch.compile. Where that fails, torch warns once and runs it uncompiled in this whole process."""
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64  # one program for each mode, precision and shape; beyond, none is compiled
    return torch.compile(WideResNet.trunk, dynamic=False)


@dataclass(frozen=True)
class Step:
    """What a method does with a batch. Nothing in it waits for the device, but for what a method's own state says."""

    method: str
    settings: TrainingSettings
    model: WideResNet
    optimizer: torch.optim.Optimizer
    own: MethodState | None = None

    def sample(self, batch: Batch, state: SamplingState, noise: torch.Generator, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What the method samples (or only these), in its order, by name: images (B, C, H, W) in [-1, 1], or what else SAMPLES makes."""
        samples: dict[str, list[Tensor]] = {}
        slices = self.settings.compute.accumulate
        for i in range(slices):
            chains = None if state.chains is None else state.chains.part(i, slices)
            made = {name: share(value, i, slices) for name, value in state.made.items()}
            part, of_part = batch.part(i, slices), replace(state, chains=chains, own=self.own, made=made)
            for name in registry.METHODS[self.method].samples if only is None else only:
                sample = registry.load(registry.SAMPLES, name)
                with self.computing(), autocast(batch.x.device, self._precision):
                    made[name] = sample(self.model, part, of_part, noise)
                samples.setdefault(name, []).append(made[name])
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in samples.items()}

    def update(self, batch: Batch, samples: dict[str, Tensor], when: When) -> Terms:
        """Change the weights once; returns the loss's terms, detached, means over the batch."""
        loss = registry.load(registry.METHODS, self.method)
        update = registry.load(registry.UPDATES, self.settings.update.name)
        slices = self.settings.compute.accumulate

        def on(i: int) -> Terms:
            part = {name: share(value, i, slices) for name, value in samples.items()}
            with autocast(batch.x.device, self._precision):
                terms: Terms = loss(self.model, batch.part(i, slices), part, self.settings.weights)
            return terms

        closures = [partial(on, i) for i in range(slices)]
        with self.computing():
            terms: Terms = update(self.model, self.optimizer, closures, self.settings.update, when)
        return terms

    def learn(self, batch: Batch, samples: dict[str, Tensor], terms: Terms, index: int, noise: torch.Generator) -> Terms:
        """Let the method's own state, if it has any, change with the step that was just made, the index-th of the training, from 0.

        Returns the step's terms with what is logged of it.
        """
        if self.own is None:
            return terms
        with self.computing(), autocast(batch.x.device, self._precision):
            logged = self.own.after(self.model, batch, samples, terms, index, noise)
        return replace(terms, logged={**terms.logged, **logged})

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The settings' precision, compilation and recomputation of blocks, for a step alone; then the network is as before."""
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
