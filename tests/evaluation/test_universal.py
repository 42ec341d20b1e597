"""Universal perturbations against closed forms of linear networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ebjdat.evaluation import robust, universal
from ebjdat.intervals import wilson

from ..networks import Curved, images, labelled

RADIUS = 0.05


class Binary(nn.Module):
    """Two classes, logits (0, w x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(5)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        z = ((x - 0.5).flatten(1) * self.w).sum(1)
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("label", [0, 1])
def test_on_a_linear_binary_model_it_is_the_direction_in_closed_form(label: int) -> None:
    """Images of class 1 lose most along -sign(w), those of class 0 along sign(w); a tenth of the radius a step, so after ten steps."""
    x, y = images(20), torch.full((20,), label)
    found = universal.perturbation(Binary(), x, y, RADIUS, 10, 8, 0)
    expected = (-1 if label else 1) * RADIUS * Binary().w.sign().view(1, 1, 4, 4)
    assert torch.allclose(found, expected, atol=1e-7)
    half = universal.perturbation(Binary(), x, y, RADIUS, 5, 8, 0)
    assert torch.allclose(half, expected / 2, atol=1e-7)


def test_the_margin_of_each_image_falls_by_what_the_norm_says() -> None:
    """w (x + delta) = w x - radius |w|_1, so accuracy is known: of images of class 1, those whose margin is larger."""
    x = images(40)
    margins = Binary()(x)[:, 1]
    x = x[margins > 0]
    y, held_out = torch.ones(len(x), dtype=torch.int64), images(40)[margins > 0][::2]
    margins = margins[margins > 0]
    radius = float(margins.median() * 1.01 / Binary().w.abs().sum())
    found = universal.measure(Binary(), (held_out, y[::2]), (x, y), radius, 10, 8, 0)
    stand = int((margins > radius * Binary().w.abs().sum()).sum())
    assert found["universal"]["correct"] == stand
    assert 3 < stand < len(x) - 3
    assert (found["universal"]["low"], found["universal"]["high"]) == wilson(stand, len(x))
    assert found["universal_random"]["acc"] > found["universal"]["acc"]
    assert found[""] == {"n_universal": len(held_out)}


def test_it_stays_in_the_ball_and_images_in_the_box() -> None:
    model, x = Curved().eval(), torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = labelled(model, x, 0)
    found = universal.perturbation(model, x, y, RADIUS, 33, 8, 0)
    assert 0 < float(found.abs().max()) <= RADIUS + 1e-8
    assert torch.equal(found, universal.perturbation(model, x, y, RADIUS, 33, 8, 0))
    assert not torch.equal(found, universal.perturbation(model, x, y, RADIUS, 33, 8, 1))  # other batches
    control = universal.random_signs(x, RADIUS, 0)
    assert control.abs().unique().tolist() == [pytest.approx(RADIUS)]
    assert 0 < int((control > 0).sum()) < 16
    for delta in (found, control):
        assert 0 <= float(universal.added(x, delta).min()) <= float(universal.added(x, delta).max()) <= 1


def test_without_a_radius_it_is_clean_accuracy() -> None:
    model, x = Curved().eval(), images(30)
    y = labelled(model, x, 5)
    found = universal.measure(model, (x, y), (x, y), 0.0, 5, 8, 0)
    clean = int((robust.predictions(model, x, 8) == y).sum())
    assert [found[name]["correct"] for name in ("universal", "universal_random")] == [clean, clean]


def test_it_is_found_on_one_set_and_takes_more_from_another_than_random_signs() -> None:
    model, x = Curved().eval(), images(200)
    y = labelled(model, x, 0)
    keep = y == y.mode().values  # of one class, which one change can move
    x, y = x[keep], y[keep]
    held_out, test = (x[::2], y[::2]), (x[1::2], y[1::2])
    found = universal.measure(model, held_out, test, 0.03, 30, 16, 0)
    assert found["universal"]["acc"] < found["universal_random"]["acc"] - 0.2


def test_test_images_have_no_part_in_finding_it() -> None:
    """Found on images of class 0, it moves those of class 1 further into their class: all stay right, however large it is."""
    x = images(40)
    of_one = Binary()(x)[:, 1] > 0
    zeros, ones = torch.zeros(int((~of_one).sum()), dtype=torch.int64), torch.ones(int(of_one.sum()), dtype=torch.int64)
    found = universal.measure(Binary(), (x[~of_one], zeros), (x[of_one], ones), 0.3, 10, 8, 0)
    assert found["universal"]["acc"] == 1.0
