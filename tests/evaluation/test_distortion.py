"""SSIM and L2 against closed forms and SciPy's filters; of attacks, against their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ebjdat.evaluation import autoattack, distortion, robust
from ebjdat.evaluation.audit import audit

from ..networks import Curved, images, labelled, settings


def random_images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def test_equal_images_are_alike_and_an_inverted_one_is_not() -> None:
    x = random_images(4, 3, 16, 12)
    assert distortion.ssim(x, x).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
    assert (distortion.ssim(x, 1 - x) < -0.5).all()  # the covariance is minus the variance
    assert torch.allclose(distortion.ssim(x, 0.5 * x), distortion.ssim(0.5 * x, x))


def test_a_shift_in_closed_form() -> None:
    """Of a constant image, (2 m (m + c) + C1) / (m^2 + (m + c)^2 + C1); any image's structure is left, too."""
    m, c = 0.4, 0.1
    expected = (2 * m * (m + c) + 1e-4) / (m**2 + (m + c) ** 2 + 1e-4)
    flat = torch.full((1, 1, 12, 12), m)
    assert float(distortion.ssim(flat, flat + c)) == pytest.approx(expected, abs=1e-7)  # fp32 pixels
    assert float(distortion.l2(flat, flat + c)) == pytest.approx(12 * c, rel=1e-6)


@pytest.mark.parametrize(("side", "radius"), [(16, 5), (11, 5), (8, 3), (4, 1), (1, 0)])
def test_against_scipys_gaussian_filter(side: int, radius: int) -> None:
    """Moments by its filter, at places whose window lies within the image; smaller images have a smaller window."""
    a, b = random_images(2, 3, side, side), random_images(2, 3, side, side, seed=1)
    expected = []
    for first, second in zip(a.double().numpy(), b.double().numpy(), strict=True):
        places = []
        for p, q in zip(first, second, strict=True):

            def mean(values: np.ndarray) -> np.ndarray:
                full = gaussian_filter(values, 1.5, radius=radius, mode="reflect")
                return full[radius : side - radius, radius : side - radius]

            mp, mq = mean(p), mean(q)
            vp, vq, cov = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
            places.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        expected.append(np.mean(places))
    assert distortion.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_means_are_those_of_the_images_that_broke_an_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PGD's from its images; the ensemble's from those of whichever attack was first. Also when an evaluation is continued."""
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    asked = settings(0.012, 30, batch_size=10)
    quick = asked.protocols["quick"]
    asked = asked.model_copy(update={"protocols": {"standard": settings(0.012, 0).standard, "quick": quick}})
    seen: list[tuple[Tensor, Tensor]] = []
    for name in quick.attacks:

        def noting(network: autoattack.FastNetwork, at: Tensor, labels: Tensor, *rest: object, attack: object = getattr(autoattack, name)):  # type: ignore[no-untyped-def]
            moved = attack(network, at, labels, *rest)  # type: ignore[operator]
            seen.append((at, moved))
            return moved

        monkeypatch.setattr(autoattack, name, noting)
    found = audit(model, x, y, asked, state=tmp_path, with_checks=False).metrics
    moved = robust.pgd_examples(model, x, y, quick, asked.seed, 10)
    broken = (model(x).argmax(1) == y) & (model(moved).argmax(1) != y)
    assert found["quick_pgd20_found_n"] == int(broken.sum()) > 5
    assert found["quick_pgd20_found_l2"] == pytest.approx(float((moved - x)[broken].flatten(1).norm(dim=1).mean()), rel=1e-5)
    assert found["quick_pgd20_found_ssim"] == pytest.approx(float(distortion.ssim(moved, x)[broken].mean()), rel=1e-5)
    before, after = (torch.cat(parts) for parts in zip(*seen, strict=True))
    wrong = torch.cat([robust.predictions(model, at, 10) for at in (after,)]) != robust.predictions(model, before, 10)
    assert found["quick_autoattack_found_n"] == int(wrong.sum()) > 5
    assert found["quick_autoattack_found_ssim"] == pytest.approx(float(distortion.ssim(after, before)[wrong].mean()), rel=1e-6)
    assert audit(model, x, y, asked, state=tmp_path, with_checks=False).metrics == found


def test_where_nothing_is_found_there_is_no_mean() -> None:
    model, x = Curved().eval(), images(8)
    found = audit(model, x, labelled(model, x), settings(1e-5, 0), with_checks=False).metrics
    assert found["pgd20_found_n"] == 0
    assert (found["pgd20_found_l2"], found["pgd20_found_ssim"]) == (None, None)
