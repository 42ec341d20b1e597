"""Samplers against slow, obvious versions; projections as properties; chain starts against numpy's covariance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from ebjdat import registry
from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.buffer import ReplayBuffer
from ebjdat.samplers.chains import run_chain
from ebjdat.samplers.pgd import (
    cross_entropy_score,
    joint_energy_score,
    kl_score,
    project,
    projected_gradient,
    random_point,
    released_ce_score,
    released_score,
)
from ebjdat.samplers.pyld import pyld
from ebjdat.samplers.sgld import clipped_sgld, sgld
from ebjdat.samplers.starts import StartPool, class_gaussians, data, uniform
from ebjdat.settings import ChainSettings


@pytest.fixture(scope="module")
def pool(digits: Prepared, train_data: DeviceData) -> StartPool:
    return StartPool.of(train_data, torch.from_numpy(digits.class_mean))


def slow_pyld(model: WideResNet, x: Tensor, spec: ChainSettings) -> Tensor:
    """PYLD one image at a time; the inner gradient as the stem's transposed convolution, written out by pixel."""
    weight = model.stem.weight.detach()  # (16, 1, 3, 3)
    for _ in range(spec.steps):
        h = model.stem(x).detach().requires_grad_(True)
        model.trunk(h).logsumexp(1).sum().backward()
        p = h.grad
        assert p is not None
        gradient = torch.zeros_like(x)
        for i in range(8):
            for j in range(8):
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < 8 and 0 <= j + dj < 8:
                            gradient[:, 0, i + di, j + dj] += p[:, :, i, j] @ weight[:, 0, 1 + di, 1 + dj]
        for _ in range(spec.inner_steps):  # clamped after each, as JEM++'s code does
            x = (x + spec.step_size * (gradient if spec.clamp is None else gradient.clamp(-spec.clamp, spec.clamp))).clamp(-1, 1)
    return x


@pytest.mark.parametrize("clamp", [None, 0.01, 1.0])
def test_pyld_matches_a_slow_loop(clamp: float | None, network: WideResNet, rng: torch.Generator) -> None:
    spec = ChainSettings(steps=3, inner_steps=2, step_size=0.5, clamp=clamp, noise=0.0)
    x = torch.rand(3, 1, 8, 8, generator=rng) * 2 - 1
    with frozen_parameters(network, "eval"):
        fast, slow = pyld(network, x, marginal_energy, spec, rng), slow_pyld(network, x, spec)
    assert (fast - x).abs().max() > 1e-3
    assert (clamp is not None) or fast.abs().max() == 1  # the range binds
    assert torch.allclose(fast, slow, atol=1e-5)  # float32 sums in another order


def test_pyld_runs_the_trunk_once_per_outer_step(network: WideResNet, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, trunk = [], network.trunk
    monkeypatch.setattr(network, "trunk", lambda h: calls.append(1) or trunk(h))
    with frozen_parameters(network, "eval"):
        pyld(network, torch.zeros(2, 1, 8, 8), marginal_energy, ChainSettings(steps=3, inner_steps=7), rng)
    assert len(calls) == 3


def slow_langevin(model: WideResNet, x: Tensor, spec: ChainSettings, noise: list[Tensor], clipped: bool, label: int | None) -> Tensor:
    """One image, one step at a time: x + step * d(-E)/dx + noise, with JEM's and SADA-JEM's clamps written out."""
    for k in range(spec.steps):
        x = x.detach().requires_grad_(True)
        logits = model(x[None])[0]
        density = torch.log(torch.exp(logits).sum()) if label is None else logits[label]
        density.backward()
        gradient = x.grad
        assert gradient is not None
        if clipped and spec.clamp is not None:
            gradient = torch.minimum(torch.maximum(gradient, torch.tensor(-spec.clamp)), torch.tensor(spec.clamp))
        x = x.detach() + spec.step_size * gradient + spec.noise * noise[k]
        if clipped:
            x = x.clamp(-1, 1)
    return x.detach()


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", ["sgld", "clipped_sgld"])
def test_langevin_samplers_match_a_slow_loop(name: str, conditional: bool, network: WideResNet, rng: torch.Generator) -> None:
    clamp = None if name == "sgld" else 0.05
    spec = ChainSettings(sampler=name, conditional=conditional, steps=4, step_size=2.0, noise=0.02, clamp=clamp)
    x, y = torch.rand(3, 1, 8, 8, generator=rng) * 2 - 1, torch.tensor([3, 0, 7])
    replay = torch.Generator().manual_seed(5)
    noise = [torch.randn(3, 1, 8, 8, generator=replay) for _ in range(4)]
    with frozen_parameters(network, "eval"):
        fast = run_chain(network, x, y, spec, torch.Generator().manual_seed(5))
        slow = [
            slow_langevin(network, x[i], spec, [n[i] for n in noise], name == "clipped_sgld", int(y[i]) if conditional else None)
            for i in range(3)
        ]
    assert torch.allclose(fast, torch.stack(slow), atol=1e-4)  # float32, four steps of size 2
    assert (fast.abs().max() > 1) == (name == "sgld")  # JEM's chains may leave the range, SADA-JEM's may not
    assert not fast.requires_grad


def test_conditional_chains_go_to_their_class(network: WideResNet, rng: torch.Generator) -> None:
    x, y = torch.rand(20, 1, 8, 8, generator=rng) * 2 - 1, torch.arange(20) % 10
    spec = ChainSettings(steps=10, step_size=0.02)
    with frozen_parameters(network, "eval"):
        free, bound = (run_chain(network, x, y, spec.model_copy(update={"conditional": c}), rng) for c in (False, True))
        joint, marginal = network(bound)[range(20), y], network(free)[range(20), y]
        assert (joint > network(x)[range(20), y]).all()
    assert (joint > marginal).float().mean() > 0.9


@pytest.mark.parametrize("sampler", [sgld, clipped_sgld, pyld])
def test_samplers_read_the_settings_that_the_registry_says(sampler: Any, network: WideResNet, rng: torch.Generator) -> None:
    """`ebjdat methods` lists them; a setting that is not read would be changed by a user for nothing."""
    seen: set[str] = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            seen.add(name)
            return getattr(ChainSettings(noise=0.01), name)

    with frozen_parameters(network, "eval"):
        sampler(network, torch.zeros(1, 1, 8, 8), marginal_energy, Watched(), rng)
    assert seen == set(registry.SAMPLERS[sampler.__name__].reads)


def test_stem_gradient_is_autograds(network: WideResNet, rng: torch.Generator) -> None:
    x, p = torch.randn(2, 1, 9, 9, generator=rng, requires_grad=True), torch.randn(2, 16, 9, 9, generator=rng)
    (expected,) = torch.autograd.grad((network.stem(x) * p).sum(), x)
    assert torch.allclose(network.stem_gradient(p), expected, atol=1e-5)  # float32


def test_pyld_goes_down_the_energy_and_stays_an_image(network: WideResNet, rng: torch.Generator) -> None:
    x = torch.rand(64, 1, 8, 8, generator=rng) * 2 - 1
    with frozen_parameters(network, "eval"):
        moved = pyld(network, x, marginal_energy, ChainSettings(steps=5, step_size=0.02), rng)
        assert (network(moved).logsumexp(1) > network(x).logsumexp(1)).all()
    assert moved.abs().max() <= 1
    assert not moved.requires_grad


@pytest.mark.parametrize("sampler", [pyld, clipped_sgld])
def test_noise_does_not_leave_the_range(sampler: Any, network: WideResNet, rng: torch.Generator) -> None:
    with frozen_parameters(network, "eval"):
        moved = sampler(network, torch.zeros(8, 1, 8, 8), marginal_energy, ChainSettings(steps=2, noise=2.0), rng)
    assert moved.abs().max() == 1


def test_clamps_of_one_bind_too(network: WideResNet, rng: torch.Generator) -> None:
    """On logits scaled until gradients are beyond 1, one step moves every pixel by at most the step size, many by exactly that."""
    with torch.no_grad():
        network.head.weight.mul_(1e4)
    x = torch.zeros(4, 1, 8, 8)
    with frozen_parameters(network, "eval"):
        moved = clipped_sgld(network, x, marginal_energy, ChainSettings(steps=1, step_size=0.1, clamp=1.0), rng)
    assert moved.abs().max() == pytest.approx(0.1)
    assert (moved.abs() > 0.0999).float().mean() > 0.2


def test_pyld_noise_is_per_outer_step(network: WideResNet) -> None:
    """With steps too small to matter, what remains is the sum of `steps` independent draws."""
    spec = ChainSettings(steps=2, inner_steps=3, step_size=1e-9, noise=0.01)
    x = torch.zeros(64, 1, 8, 8)
    with frozen_parameters(network, "eval"):
        moved = pyld(network, x, marginal_energy, spec, torch.Generator().manual_seed(1))
    assert moved.std() == pytest.approx(0.01 * 2**0.5, rel=0.05)  # 4096 samples: standard error 1 %


images = st.integers(0, 2**31 - 1).map(lambda seed: torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed)))


@given(images, st.floats(0.001, 1.0), st.sampled_from(["Linf", "L2"]), st.floats(0, 3), st.integers(0, 1000))
@hypothesis_settings(deadline=None)
def test_projection_stays_in_ball_and_bounds(x: Tensor, eps: float, norm: str, far: float, seed: int) -> None:
    moved = x + far * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    found = project(moved, x, eps, norm, (0.0, 1.0))
    size = (found - x).abs().amax() if norm == "Linf" else (found - x).flatten(1).norm(dim=1).max()
    assert size <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose(project(found, x, eps, norm, (0.0, 1.0)), found, atol=1e-6)
    start = random_point(x, eps, norm, (0.0, 1.0), torch.Generator().manual_seed(seed))
    assert torch.allclose(project(start, x, eps, norm, (0.0, 1.0)), start, atol=1e-6)


def test_random_points_fill_the_ball() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.full((4000, 1, 1, 2), 0.5)
    box = random_point(x, 0.2, "Linf", (0.0, 1.0), rng) - x
    assert box.std() == pytest.approx(0.2 / 3**0.5, rel=0.03)  # uniform; 8000 draws
    disc = (random_point(x, 0.2, "L2", (0.0, 1.0), rng) - x).flatten(1).norm(dim=1)
    assert (disc < 0.1).float().mean() == pytest.approx(0.25, abs=0.03)  # area of the half radius


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_projected_gradient_on_a_linear_score_has_a_closed_form(norm: str, rng: torch.Generator) -> None:
    """max <w, x'> over the ball is x + eps sign(w), or x + eps w / |w|, where the bounds do not bind."""
    w = torch.randn(1, 1, 4, 4, generator=rng)
    x = torch.rand(5, 1, 4, 4, generator=rng) * 0.2 + 0.4
    found = projected_gradient(
        lambda z: (z * w).flatten(1).sum(1), x, eps=0.1, step_size=0.03, steps=20, norm=norm, bounds=(0.0, 1.0), start=x
    )
    best = x + 0.1 * (w.sign() if norm == "Linf" else w / w.norm())
    assert torch.allclose(found, best, atol=1e-3)


def test_scores_move_images_the_way_they_say(network: WideResNet, rng: torch.Generator) -> None:
    x = torch.rand(16, 1, 8, 8, generator=rng) * 2 - 1
    y = torch.arange(16) % 10
    attack = {"eps": 0.1, "step_size": 0.02, "steps": 5, "norm": "Linf", "bounds": (-1.0, 1.0), "start": x}
    with frozen_parameters(network, "eval"):
        up = projected_gradient(joint_energy_score(network, x, y), x, **attack)  # type: ignore[arg-type]
        assert (network(up)[range(16), y] < network(x)[range(16), y]).all()  # E(x, y) = -f(x)[y] went up
        down = projected_gradient(released_score(network, x, y), x, **attack)  # type: ignore[arg-type]
        assert (network(down)[range(16), y] > network(x)[range(16), y]).all()  # the released code goes down
        away = projected_gradient(released_ce_score(network, x, y), x, **attack)  # type: ignore[arg-type]
        assert (network(away).log_softmax(1)[range(16), y] < network(x).log_softmax(1)[range(16), y]).all()
        wrong = projected_gradient(cross_entropy_score(network, x, y), x, **attack)  # type: ignore[arg-type]
        assert (network(wrong).log_softmax(1)[range(16), y] < network(x).log_softmax(1)[range(16), y]).all()
        attack["start"] = x + 0.01 * torch.randn(x.shape, generator=rng)
        apart = projected_gradient(kl_score(network, x, y), x, **attack)  # type: ignore[arg-type]
        before, after = (kl_score(network, x, y)(z) for z in (attack["start"], apart))
        assert (after > before).all()
    assert (up - x).abs().max() <= 0.1 + 1e-6


def test_scores_by_hand(network: WideResNet, rng: torch.Generator) -> None:
    """KL against torch.distributions; the released scores with their distance of normalised logits written out.

    Commented out, the release has the mean cross-entropy over a slice of two images, whose gradient is that of half of each.
    """
    x, moved = torch.rand(2, 6, 1, 8, 8, generator=rng) * 2 - 1
    y = torch.arange(6)
    with frozen_parameters(network, "eval"), torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=network(z)) for z in (x, moved))
        expected = torch.distributions.kl_divergence(p, q)
        assert torch.allclose(kl_score(network, x, y)(moved), expected, atol=1e-5)
        found, found_ce = released_score(network, x, y)(moved), released_ce_score(network, x, y)(moved)
        for i in range(6):
            f, g = network(x)[i].double(), network(moved)[i].double()
            distance = ((f / (f * f).sum().sqrt() - g / (g * g).sum().sqrt()) ** 2).sum()
            assert float(found[i]) == pytest.approx(float(g[y[i]] + distance), abs=1e-4)
            cross_entropy = g.exp().sum().log() - g[y[i]]
            assert float(found_ce[i]) == pytest.approx(float(cross_entropy / 2 + distance), abs=1e-4)


def test_without_projection_steps_add_up_beyond_the_ball() -> None:
    """The released walk: started in the box of 8, five steps of 2 reach 18; only the image range holds it."""
    x = torch.tensor([0.0, 0.95]).view(1, 1, 1, 2)
    start = x + torch.tensor([8 / 255, 0.04]).view(1, 1, 1, 2)
    budget = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 5, "norm": "Linf", "bounds": (-1.0, 1.0), "start": start}
    free = projected_gradient(lambda z: z.flatten(1).sum(1), x, into_ball=False, **budget) - x  # type: ignore[arg-type]
    assert free.flatten().tolist() == pytest.approx([18 / 255, 0.05], abs=1e-6)
    held = projected_gradient(lambda z: z.flatten(1).sum(1), x, **budget) - x  # type: ignore[arg-type]
    assert held.flatten().tolist() == pytest.approx([8 / 255, 8 / 255], abs=1e-6)


def test_class_gaussians_have_the_training_images_mean_and_covariance() -> None:
    """Against numpy's covariance in [-1, 1], on correlated mid-grey images that clamping cannot reach."""
    source = np.random.default_rng(0)
    mixed = source.normal(size=(60, 16)) @ source.normal(size=(16, 16)) * 3 + 128
    labels = np.arange(60) % 2
    images = mixed.clip(0, 255).round().astype(np.uint8).reshape(60, 1, 4, 4)
    index = np.arange(60)
    mean = np.stack([images[labels == k].mean(0) / 255 for k in range(2)]).astype(np.float32)
    data = DeviceData(Prepared(images, labels, index, index, index, mean, ("a", "b"), ""), "train", torch.device("cpu"))
    n = 40_000
    rng = torch.Generator().manual_seed(0)
    drawn = class_gaussians(StartPool.of(data, torch.from_numpy(mean)), torch.ones(n, dtype=torch.long), rng).flatten(1).numpy()
    x = images[labels == 1].reshape(-1, 16) / 255 * 2 - 1
    expected = np.cov(x.T) + 1e-4 * np.eye(16)
    spread = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    # standard error of a covariance is at most spread * sqrt(2 / n) = 0.7 %; the floor alone is 1 to 2 % of a variance
    assert np.abs((np.cov(drawn.T) - expected) / spread).max() < 0.03
    assert np.abs((drawn.mean(0) - x.mean(0)) / x.std(0)).max() < 5 / n**0.5
    assert 1e-4 / expected.diagonal().max() > 0.001


def test_class_gaussians_follow_their_labels(digits: Prepared, pool: StartPool, rng: torch.Generator) -> None:
    labels = torch.arange(300) % 10
    drawn = class_gaussians(pool, labels, rng)
    distance = ((drawn[:, None] - pool.mean[None]) ** 2).flatten(2).sum(2)
    assert (distance.argmin(1) == labels).float().mean() > 0.8


def test_data_starts_are_training_images_of_their_class(pool: StartPool, rng: torch.Generator) -> None:
    labels = torch.arange(200) % 10
    x = data(pool, labels, rng)
    images = pool.data.internal()
    for i in range(0, 200, 7):
        same = (images == x[i]).flatten(1).all(1)
        assert same.any()
        assert (pool.data.labels[same] == labels[i]).all()
    assert len(torch.unique(x.flatten(1), dim=0)) > 100


def test_uniform_starts(pool: StartPool, rng: torch.Generator) -> None:
    x = uniform(pool, torch.zeros(500, dtype=torch.long), rng)
    assert x.shape == (500, 1, 8, 8)
    assert x.abs().max() <= 1
    assert x.var() == pytest.approx(1 / 3, rel=0.02)  # of a uniform on [-1, 1]


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
