"""What a step samples: chains in their mode, adversarial neighbours within their budget."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ebjdat import registry
from ebjdat.data.batches import Batch, DeviceData, epoch_batches
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet, build
from ebjdat.objectives import sampling
from ebjdat.objectives.sampling import SamplingState, adversarial, negatives, neighbours, sampling_states
from ebjdat.pixels import internal_distance
from ebjdat.samplers.budgets import Budget
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.chains import starter
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import AdversarySettings, BudgetSettings, ModelSettings, Profile, TrainingSettings
from tests.objectives.test_recipes import form


@pytest.mark.parametrize("variant", ["wrn", "jem"])
def test_chains_count_in_running_statistics_for_the_jem_familys_network_alone(
    variant: str, state: SamplingState, train_data: DeviceData, rng: torch.Generator
) -> None:
    """Of five trunk passes in train mode; an adversary in eval mode never counts. Against each pass's own mean, weighted."""
    network = build(ModelSettings(depth=10, width=1, variant=variant), 1, 10, 0)  # type: ignore[arg-type]
    network.train()
    passes: list[Tensor] = []
    network.blocks[0].norm1.register_forward_hook(lambda module, given, result: passes.append(given[0].detach().mean((0, 2, 3))))
    batch = next(epoch_batches(train_data, 64, state.settings.augment, 0, 0))
    spec = state.settings.chain.model_copy(update={"steps": 3, "mode": "train"})
    negatives(network, batch, replace(state, settings=state.settings.model_copy(update={"chain": spec})), rng)
    expected = torch.zeros(16)
    for seen in passes:
        expected = 0.1 * expected + 0.9 * seen
    assert len(passes) == 3
    assert network.training
    found = network.blocks[0].norm1.running_mean.clone()
    assert torch.allclose(found, expected if variant == "jem" else torch.zeros(16), atol=1e-6)
    neighbours(network, batch.x, batch.y, form("released")[0].adversary, rng)
    assert torch.equal(network.blocks[0].norm1.running_mean, found)


def test_neighbours_of_both_forms_on_a_real_network(network: WideResNet, train_data: DeviceData, rng: torch.Generator) -> None:
    """paper: up the joint energy, within 8/255 of [0, 1]; released: down, up to 18/255 of [-1, 1], i.e. 9/255."""
    network.eval()
    x, y = train_data.internal(slice(0, 32)), train_data.labels[:32]

    def reach(name: str) -> tuple[torch.Tensor, float]:
        moved = neighbours(network, x, y, form(name)[0].adversary, rng)
        with torch.no_grad():
            rise = network(x)[range(32), y] - network(moved)[range(32), y]
        return rise, float((moved - x).abs().max()) / 2 * 255

    rise, radius = reach("paper")
    assert (rise > 0).all()
    assert radius == pytest.approx(8, abs=1e-3)
    rise, radius = reach("released")
    assert (rise < 0).all()
    assert 8 < radius <= 9 + 1e-3
    moved = neighbours(network, x, y, form("released_ce")[0].adversary, rng)
    with torch.no_grad():
        assert (network(moved).log_softmax(1)[range(32), y] < network(x).log_softmax(1)[range(32), y]).all()
    assert 8 < float((moved - x).abs().max()) / 2 * 255 <= 9 + 1e-3


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_chains_walk_in_their_mode_to_their_own_class_and_start_afresh_by_chance(
    mode: str, state: SamplingState, pool: StartPool, network: WideResNet, train_data: DeviceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sampler is handed, with a buffer of fives: reinit 1 starts every chain anew, 0 none."""
    seen: list[tuple[bool, Tensor, Tensor]] = []
    monkeypatch.setattr(sampling, "run_chain", lambda model, x, y, spec, noise: seen.append((model.training, x.clone(), y)) or x)
    network.train()
    rng = torch.Generator().manual_seed(0)
    batch = next(epoch_batches(train_data, 64, state.settings.augment, 0, 0))
    assert state.buffer is not None
    for reinit in (0.0, 1.0):
        state.buffer.images.fill_(5.0)
        chain = state.settings.chain.model_copy(update={"mode": mode, "reinit": reinit})
        settings = state.settings.model_copy(update={"chain": chain})
        (begun,) = sampling_states(SamplingState(settings, state.buffer), pool, ("test",), 0, 1)
        negatives(network, batch, begun, rng)
        training, x, y = seen[-1]
        assert training == (mode == "train")
        assert (x == 5.0).all() == (reinit == 0.0)
        assert (x != 5.0).flatten(1).any(1).all() == (reinit == 1.0)
    means = pool.mean[y]
    assert float(((x - means) ** 2).mean()) < float(((x - means.roll(1, 0)) ** 2).mean())  # labels are the chains', not the batch's
    assert not torch.equal(y, batch.y)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
def test_where_neighbours_start(start: str, network: WideResNet, train_data: DeviceData, rng: torch.Generator) -> None:
    """With steps of next to nothing the start is what is left."""
    spec = AdversarySettings(eps=0.1, step_size=1e-9, steps=1, start=start)  # type: ignore[arg-type]
    x = train_data.internal(slice(0, 64)) * 0.5  # mid-grey: the range does not bind
    away = neighbours(network, x, train_data.labels[:64], spec, rng) - x
    spread = {"uniform": 0.2 / 3**0.5, "gaussian": 0.002, "clean": 0.0}[start]  # internal: twice the [0, 1] distance
    assert float(away.std()) == pytest.approx(spread, rel=0.05, abs=1e-6)


@pytest.fixture
def state(pool: StartPool, settings: TrainingSettings) -> SamplingState:
    rng = torch.Generator().manual_seed(0)
    start = starter(settings.chain, pool)
    buffer = ReplayBuffer.fresh(200, 10, start, torch.device("cpu"), rng)
    return SamplingState(settings, buffer, buffer.take(buffer.plan(1, 64, settings.chain.reinit, start, rng), 0))


def test_a_step_moves_as_many_chains_as_the_density_term_has_images(state: SamplingState, pool: StartPool) -> None:
    settings = state.settings.model_copy(update={"density_batch": "own", "density_batch_size": 24})
    for asked, n in ((settings, 24), (state.settings, 64)):
        (begun,) = sampling_states(SamplingState(asked, state.buffer), pool, ("test",), 0, 1)
        assert begun.chains is not None
        assert len(begun.chains.x) == len(begun.chains.slots) == n


@pytest.mark.parametrize("first", [2, sampling.PLANNED_STEPS, sampling.PLANNED_STEPS + 1])
def test_an_interrupted_epoch_goes_on_with_the_same_chains(first: int, state: SamplingState, pool: StartPool) -> None:
    whole, rest = (list(sampling_states(state, pool, ("test",), begin, sampling.PLANNED_STEPS + 3)) for begin in (0, first))
    for one, other in zip(whole[first:], rest, strict=True):
        assert one.chains is not None
        assert other.chains is not None
        assert torch.equal(one.chains.slots, other.chains.slots)
        assert torch.equal(one.chains.x, other.chains.x)


def test_draws_leave_the_network_alone_and_respect_the_budget(
    state: SamplingState, network: WideResNet, train_data: DeviceData, settings: TrainingSettings, rng: torch.Generator
) -> None:
    batch = next(epoch_batches(train_data, 64, settings.augment, 0, 0))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    moved = adversarial(network, batch, state, rng)
    eps = internal_distance(settings.adversary.eps)
    assert eps == 2 * settings.adversary.eps  # [0, 1] budget in the range [-1, 1]
    assert 0.5 * eps < (moved - batch.x).abs().max() <= eps + 1e-6
    assert moved.abs().max() <= 1
    assert state.buffer is not None
    old = state.buffer.images.clone()
    x = negatives(network, batch, state, rng)
    changed = (state.buffer.images != old).flatten(1).any(1)
    assert changed.sum() == 64
    assert sorted(row.sum().item() for row in x) == pytest.approx(sorted(row.sum().item() for row in state.buffer.images[changed]))
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "num_batches" not in k)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "length"),
    [("fgsm", 1.739), ("rs_fgsm", 1.545), ("n_fgsm", 2.655)],  # of 3 x 32 x 32 pixels at 8/255, away from 0 and 1
)
def test_single_steps_have_their_published_lengths(name: str, length: float, rng: torch.Generator) -> None:
    """Expected L2 lengths by integrating the coordinates' densities: eps sqrt(d); E min(|u + 1.25 s|, 1)^2; 1 + 4/3 under N-FGSM."""
    preset = registry.METHODS[name].defaults["adversary"]
    spec = AdversarySettings.model_validate({"eps": "8/255", "step_size": "2/255", "mode": "eval", **preset})

    class Slope(torch.nn.Module):
        """Two classes, whose difference is a sum of pixels with random signs."""

        signs = torch.randint(0, 2, (3 * 32 * 32,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1

        def forward(self, x: Tensor) -> Tensor:
            score = (x.flatten(1) * self.signs).sum(1) / 100
            return torch.stack([score, -score], 1)

    x, y = torch.zeros(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    moved = neighbours(Slope(), x, y, spec, rng)
    lengths = (moved - x).flatten(1).norm(dim=1) / 2  # in [0, 1] pixels
    assert float(lengths.mean()) == pytest.approx(length, rel=0.005)
    assert float(lengths.std()) < 0.05


def test_uniform_points_and_corners_of_the_ball(state: SamplingState, train_data: DeviceData, rng: torch.Generator) -> None:
    batch, spec = next(epoch_batches(train_data, 64, state.settings.augment, 0, 0)), state.settings.adversary
    at = {
        name: (make(None, batch, state, rng) - batch.x) / 2 for name, make in (("uniform", sampling.uniform), ("corner", sampling.corner))
    }  # type: ignore[arg-type]
    inside = (batch.x.abs() < 1 - 2 * spec.eps).expand_as(batch.x)
    assert torch.allclose(at["corner"][inside].abs(), torch.tensor(spec.eps))
    assert float((at["corner"][inside] > 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(at["uniform"].abs().max()) <= spec.eps + 1e-6
    assert float(at["uniform"][inside].std()) == pytest.approx(spec.eps / 3**0.5, rel=0.05)


@pytest.fixture
def tailed(digits: Prepared) -> StartPool:
    """The training split without most of its first classes, so that the last is the most frequent."""
    kept = np.concatenate([digits.train[digits.labels[digits.train] == c][: 10 * (c + 1)] for c in range(10)])
    few = dataclasses.replace(digits, train=kept)
    return StartPool.of(DeviceData(few, "train", torch.device("cpu")), torch.from_numpy(digits.class_mean))


def with_budget(settings: TrainingSettings, **budget: object) -> TrainingSettings:
    adversary = settings.adversary.model_copy(update={"budget": BudgetSettings.model_validate(budget)})
    return settings.model_copy(update={"adversary": adversary, "epochs": 10})


@pytest.mark.parametrize(("name", "method"), [("robust_lt", "eb_jdat"), ("robust_lt_permuted", "pgd_at")])
def test_neighbours_stay_in_the_ball_of_their_class(
    name: str, method: str, profile: Profile, tailed: StartPool, network: WideResNet, rng: torch.Generator
) -> None:
    """Of the last epoch, whose budgets are whole; in the first, they are the images themselves."""
    settings = with_budget(profile.training_settings(method), name=name)
    x, y = tailed.data.internal(slice(0, None, 8)) * 0.5, tailed.data.labels[::8]  # mid-grey: the range does not bind
    batch, counts = Batch(x, x, y), torch.arange(10, 101, 10, dtype=torch.float64)
    state = SamplingState.of_epoch(settings, None, tailed, 9)
    factors = registry.load(registry.BUDGETS, name)(settings.adversary.budget, counts, 9, 10).by_class
    assert factors.max() > 1.2
    eps = 2 * settings.adversary.eps * factors[y]
    for sample in (adversarial, sampling.uniform, sampling.corner):
        reach = (sample(network, batch, state, rng) - x).flatten(1).abs().amax(1)
        assert (reach <= eps + 1e-6).all()
        assert (reach > (0.9 if sample is sampling.uniform else 0.5) * eps).all()
    first = SamplingState.of_epoch(settings, None, tailed, 0)
    assert torch.equal(adversarial(network, batch, first, rng), x)


def test_a_start_is_uniform_in_the_ball_of_eps_and_its_first_step_ends_in_the_class_s(
    profile: Profile, tailed: StartPool, network: WideResNet, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in RobustLT's code; a ramp's start is in the ball of its epoch."""
    seen: list[Tensor] = []
    real = sampling.projected_gradient

    def noted(score: object, x: Tensor, *, start: Tensor, **more: object) -> Tensor:
        seen.append((start - x).abs().amax())
        return real(score, x, start=start, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "projected_gradient", noted)
    x, y = tailed.data.internal(slice(0, None, 8)) * 0.5, tailed.data.labels[::8]
    eps = internal_distance(profile.training.adversary.eps)
    for name, epoch, radius in (("robust_lt", 0, eps), ("robust_lt", 9, eps), ("ramp", 0, 0.0), ("ramp", 4, eps / 2), ("uniform", 0, eps)):
        state = SamplingState.of_epoch(with_budget(profile.training_settings("pgd_at"), name=name), None, tailed, epoch)
        adversarial(network, Batch(x, x, y), state, rng)
        assert float(seen.pop()) == pytest.approx(radius, rel=0.01)


def test_a_uniform_budget_is_none_bit_for_bit(profile: Profile, tailed: StartPool, network: WideResNet) -> None:
    settings = profile.training_settings("pgd_at")
    state = SamplingState.of_epoch(settings, None, tailed, 0)
    assert state.scale is None
    x, y = tailed.data.internal(slice(0, 32)), tailed.data.labels[:32]
    found = adversarial(network, Batch(x, x, y), state, torch.Generator().manual_seed(3))
    assert torch.equal(found, neighbours(network, x, y, settings.adversary, torch.Generator().manual_seed(3)))
    ones = with_budget(settings, name="robust_lt", by_class=0.0, warmup=0.0)
    other = adversarial(network, Batch(x, x, y), SamplingState.of_epoch(ones, None, tailed, 0), torch.Generator().manual_seed(3))
    assert torch.allclose(found, other, rtol=0, atol=1e-6)  # float32 products of eps and 1
    assert state.budget(y) == Budget.usual(settings.adversary)


def test_log_counts_are_those_of_the_training_split(profile: Profile, tailed: StartPool, network: WideResNet, rng: torch.Generator) -> None:
    state = SamplingState.of_epoch(profile.training_settings("pgd_at"), None, tailed, 0)
    x, y = tailed.data.internal(slice(0, 6)), tailed.data.labels[:6]
    found = sampling.log_counts(network, Batch(x, x, y), state, rng)
    assert found.shape == (6, 10)
    assert torch.allclose(found, torch.tensor([(c + 1) / 10 for c in range(10)]).log().expand(6, -1))


def test_each_image_takes_its_own_steps_of_its_own_size(network: WideResNet, train_data: DeviceData, rng: torch.Generator) -> None:
    """From the image itself, far from its ball's end: as far as all its steps together, where no gradient turns its sign."""
    x, y = train_data.internal(slice(0, 6)) * 0.5, train_data.labels[:6]
    spec = AdversarySettings(eps=0.4, step_size=0.1, steps=9, start="clean", mode="eval")
    step, own = (torch.tensor(values).view(-1, 1, 1, 1) for values in ([1e-3, 2e-3, 1e-3, 3e-3, 1e-3, 2e-3], [3, 1, 0, 2, 1, 3]))
    moved = neighbours(network, x, y, spec, rng, Budget(0.8, step, 0.0, 3, own))
    assert (moved - x).flatten(1).abs().amax(1).tolist() == pytest.approx((step * own).flatten().tolist(), abs=1e-6)
