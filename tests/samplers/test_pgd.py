"""Projected gradients: closed forms, scores by hand, projections as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from ebjdat.models.modes import frozen_parameters
from ebjdat.models.wrn import WideResNet
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


@given(images, st.sampled_from(["Linf", "L2"]), st.floats(0, 3), st.integers(0, 1000))
@hypothesis_settings(deadline=None)
def test_a_radius_for_each_image_is_that_of_a_slow_loop(x: Tensor, norm: str, far: float, seed: int) -> None:
    """As one image after another, each with its own number (bit for bit, but for sums of lengths); a radius of 0 is the image itself."""
    moved = x + far * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    radii = [0.0, 0.03, 0.4]
    each = torch.tensor(radii).view(-1, 1, 1, 1)
    found = project(moved, x, each, norm, (0.0, 1.0))
    slow = torch.cat([project(moved[i : i + 1], x[i : i + 1], eps, norm, (0.0, 1.0)) for i, eps in enumerate(radii)])
    assert torch.allclose(found, slow, rtol=0, atol=0 if norm == "Linf" else 1e-6)
    assert torch.equal(found[0], x[0])
    start = random_point(x, each, norm, (0.0, 1.0), torch.Generator().manual_seed(seed))
    size = (start - x).flatten(1).abs().amax(1) if norm == "Linf" else (start - x).flatten(1).norm(dim=1)
    assert (size <= each.flatten() + 1e-6).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_each_image_has_its_own_radius_step_and_number_of_steps(norm: str, rng: torch.Generator) -> None:
    """A whole batch, against one image after another with plain numbers; bit for bit, but for sums of lengths (L2: 1e-6)."""
    w = torch.randn(1, 1, 4, 4, generator=rng)
    x, start = (torch.rand(5, 1, 4, 4, generator=rng) * 0.2 + 0.4 for _ in range(2))

    def score(z: Tensor) -> Tensor:
        return ((z - 0.4) ** 3 * w).flatten(1).sum(1)

    radii, steps, numbers = [0.0, 0.05, 0.1, 0.02, 0.3], [0.01, 0.02, 0.03, 0.01, 0.04], [3, 0, 5, 1, 4]
    common = {"norm": norm, "bounds": (0.0, 1.0)}
    eps, step, own = (torch.tensor(values).view(-1, 1, 1, 1) for values in (radii, steps, numbers))
    found = projected_gradient(score, x, eps=eps, step_size=step, steps=5, start=start, own_steps=own, **common)  # type: ignore[arg-type]
    for i in range(5):
        one = slice(i, i + 1)
        alone = projected_gradient(
            score,
            x[one],
            eps=radii[i],
            step_size=steps[i],
            steps=numbers[i],
            start=start[one],
            **common,  # type: ignore[arg-type]
        )
        assert torch.allclose(found[one], alone, rtol=0, atol=0 if norm == "Linf" else 1e-6)
    assert torch.equal(found[1], start[1])  # no step: where it started, even outside its ball
