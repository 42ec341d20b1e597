"""The replay buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from ebjdat.samplers.buffer import ReplayBuffer


def test_buffer_keeps_chains_and_restarts_some(rng: torch.Generator) -> None:
    calls: list[int] = []

    def start(labels: Tensor, generator: torch.Generator) -> Tensor:
        calls.append(len(labels))
        return -labels.float().view(-1, 1, 1, 1)  # recognisable: minus the class

    buffer = ReplayBuffer.fresh(1000, 10, start, torch.device("cpu"), rng)
    assert torch.equal(buffer.images.flatten(), -buffer.labels.float())
    buffer.images.fill_(5.0)
    plan = buffer.plan(3, 400, 0.25, start, rng)
    assert all(not torch.equal(plan.slots[0], plan.slots[i]) for i in (1, 2))
    firsts = sum(int(plan.again[i].sum()) for i in range(3))
    assert firsts == calls[-1] == len(plan.fresh)
    assert (torch.sort(plan.which[plan.again]).values == torch.arange(firsts)).all()  # each fresh start is used once
    chains = buffer.take(plan, 1)
    slots, x = chains.slots, chains.x
    assert torch.equal(chains.labels, buffer.labels[slots])
    assert len(slots.unique()) == 400
    fresh = x.flatten() != 5.0
    assert torch.equal(fresh, plan.again[1])
    assert 70 <= fresh.sum() <= 130  # 100 expected, standard deviation 8.7
    assert torch.equal(x.flatten()[fresh], -buffer.labels[slots][fresh].float())
    buffer.put(slots, x + 1)
    assert torch.equal(buffer.images[slots], x + 1)
    assert torch.equal(buffer.take(plan, 1).x[~fresh], x[~fresh] + 1)  # taken as the buffer is now
    untouched = torch.ones(1000, dtype=torch.bool)
    untouched[slots] = False
    assert (buffer.images[untouched] == 5.0).all()
    assert len(buffer.take(buffer.plan(1, 2500, 0.0, start, rng), 0).slots) == 2500
