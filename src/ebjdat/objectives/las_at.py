"""LAS-AT (Jia et al. 2022, arXiv 2203.06616): a policy network chooses how each image is attacked, and learns from what comes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebjdat.data.batches import Batch, generator
from ebjdat.models import wrn
from ebjdat.models.logits import predicted
from ebjdat.models.modes import evaluating
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives.parts import adversarial_terms, cross_entropies, weighted_mean
from ebjdat.objectives.sampling import SamplingState, neighbours
from ebjdat.objectives.terms import Samples, Terms
from ebjdat.pixels import internal_distance
from ebjdat.samplers.budgets import Budget
from ebjdat.settings import TrainingSettings, WeightSettings

TRUE_CLASS = 0.7  # its share of the targets
BOUND, ROBUST, CLEAN = 10.0, 4.0, 2.0  # of the reward: bound of the cross-entropy, weights of the accuracies
RESTARTS = 2  # of the attack that measures the robust accuracy
CHECK = {"score": "ce", "steps": 10, "step_ratio": 0.25, "start": "uniform", "start_ratio": 1.0, "project": True, "mode": "eval"}
LONGEST = 1.0  # length at which the policy's gradient is clipped
LOGGED = ("policy_eps", "policy_steps", "policy_step", "policy_reward")


def las_at(model: nn.Module, batch: Batch, samples: Samples, weights: WeightSettings) -> Terms:
    """Cross-entropy of x~ with targets 0.7 on y and 0.3 / (K - 1) on each other class; x~ by a policy (LAS-AT, arXiv 2203.06616).

    The policy, a network of its own, chooses radius, steps and step size of each image's attack, and learns by REINFORCE, with
    min(CE(x~), 10) + 4 accuracy under PGD-10 (2 restarts) + 2 clean accuracy as the reward of a batch. Ours is a small wide residual
    network without batch norm that begins with equal chances, theirs a ResNet-18; the accuracies are those after the step itself,
    theirs after a step of a copy without momentum.
    """
    logits = model(samples["policy"])
    others = (1 - TRUE_CLASS) / (logits.shape[1] - 1)
    targets = torch.full_like(logits, others).scatter(1, batch.y[:, None], TRUE_CLASS)
    losses = F.cross_entropy(logits, targets, reduction="none")
    ce = cross_entropies(logits, batch.y).mean()
    return adversarial_terms(weighted_mean(losses, logits, weights), batch.y, None, logits, ce_robust=ce)


def by_policy(model: WideResNet, batch: Batch, state: SamplingState, generator: torch.Generator) -> Tensor:
    """Neighbours of batch.x (B, C, H, W) in [-1, 1] within budgets that the policy chooses; starts are in the settings' own ball."""
    spec, policy = state.settings.adversary, state.own
    assert isinstance(policy, Policy)
    budget = policy.budget(batch.x, Budget.usual(spec), generator)
    return neighbours(model, batch.x, batch.y, spec, generator, budget if state.scale is None else state.scale.of(budget, batch.y))


class Policy:
    """Chances of each choice of radius, steps and step size, given an image; and how they learn.

    network: its logits are those of the three choices, one after another; None: every choice has the same chance, always.
    """

    def __init__(self, settings: TrainingSettings, network: WideResNet | None, device: torch.device) -> None:
        spec, self.network = settings.policy, network
        self.settings, self.check = spec, settings.adversary.model_copy(update=CHECK)
        self.optimizer = None if network is None else torch.optim.SGD(network.parameters(), spec.lr)
        self.values = [torch.arange(low, high + 1, device=device) for low, high in (spec.eps, spec.iterations, spec.step)]
        self.chosen: deque[Tensor] = deque(maxlen=settings.compute.accumulate)  # of the last batch: (B, 3) of each slice
        self.reward = torch.zeros((), device=device)  # the last one

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, choices) of radius, steps and step size, in fp32."""
        sizes = [len(values) for values in self.values]
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.zeros(len(x), sum(sizes), device=x.device) if self.network is None else self.network(x)
        return logits.split(sizes, 1)

    def budget(self, x: Tensor, usual: Budget, generator: torch.Generator) -> Budget:
        """Budgets of images (B, C, H, W), drawn anew; only their start is the usual one."""
        with torch.no_grad():
            drawn = [torch.multinomial(logits.softmax(1), 1, generator=generator) for logits in self.logits(x)]
        self.chosen.append(torch.cat(drawn, 1))
        eps, steps, step = (values[at].view(-1, 1, 1, 1) for values, at in zip(self.values, drawn, strict=True))
        unit = internal_distance(self.settings.unit)
        return Budget(unit * eps, unit * step, usual.start, self.settings.iterations[1], steps)

    def after(
        self, model: WideResNet, batch: Batch, samples: Samples, terms: Terms, index: int, noise: torch.Generator
    ) -> Mapping[str, Tensor]:
        chosen = torch.cat(list(self.chosen))
        if self.optimizer is not None and (index + 1) % self.settings.every == 0:
            robust, clean = self.accuracies(model, batch, noise)
            self.reward = terms.logged["ce_robust"].clamp(0, BOUND) + ROBUST * robust + CLEAN * clean
            self.reinforce(self.optimizer, batch.x, chosen)
        means = [values[at].float().mean() for values, at in zip(self.values, chosen.T, strict=True)]
        return dict(zip(LOGGED, [*means, self.reward], strict=True))

    def accuracies(self, model: WideResNet, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Shares of the batch that are classified right: under the reward's attack, of which every restart has to fail, and without."""
        slices, found = len(self.chosen), []
        for part in (batch.part(i, slices) for i in range(slices)):
            moved = [neighbours(model, part.x, part.y, self.check, noise) for _ in range(RESTARTS)]
            with evaluating(model):
                clean, *robust = (predicted(model(x)) == part.y for x in (part.x, *moved))
            found.append(torch.stack([torch.stack(robust).all(0), clean]).float().mean(1))
        robust_share, clean_share = torch.stack(found).mean(0)
        return robust_share, clean_share

    def reinforce(self, optimizer: torch.optim.Optimizer, x: Tensor, chosen: Tensor) -> None:
        """A step up reward x mean log chance of what was chosen (B, 3): REINFORCE (Williams 1992) without a baseline."""
        chances = [logits.log_softmax(1).gather(1, at[:, None]) for logits, at in zip(self.logits(x), chosen.T, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        (-self.reward.detach() * torch.cat(chances, 1).sum(1).mean()).backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], LONGEST)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        learned = {} if self.network is None else {"network": self.network.state_dict()}
        return {**learned, "optimizer": self.optimizer and self.optimizer.state_dict(), "reward": self.reward}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reward = state["reward"].to(self.reward)
        if self.network is not None and self.optimizer is not None:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])


def policy(model: WideResNet, settings: TrainingSettings, seed: int) -> Policy:
    """A policy whose choices have equal chances, on the network's device; it learns if the settings say so."""
    spec, device = settings.policy, model.head.weight.device
    if spec.choose == "uniform":
        return Policy(settings, None, device)
    choices = sum(high - low + 1 for low, high in (spec.eps, spec.iterations, spec.step))
    own_seed = generator(torch.device("cpu"), "policy", seed).initial_seed()
    network = wrn.build(spec.network, model.stem.in_channels, choices, own_seed)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    return Policy(settings, network.to(device, memory_format=torch.channels_last), device)  # type: ignore[call-overload]
