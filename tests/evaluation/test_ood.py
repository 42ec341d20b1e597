"""Out-of-distribution sets: made, brought to shape, missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ebjdat.data import made, sources
from ebjdat.errors import DataError
from ebjdat.evaluation import ood
from ebjdat.settings import DataSettings, ParamsError, ReliabilitySettings, load

from ..conftest import ROOT

DIGITS = DataSettings(source="digits", test=497, validation=130)


@pytest.fixture
def x() -> Tensor:
    """Colour images whose pixels all differ."""
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_made_sets(x: Tensor) -> None:
    found, missing = ood.choose(x, DIGITS, ReliabilitySettings(ood=ood.MADE))
    again, _ = ood.choose(x, DIGITS, ReliabilitySettings(ood=ood.MADE))
    other, _ = ood.choose(x, DIGITS, ReliabilitySettings(ood=ood.MADE, seed=1))
    assert missing == {}
    assert list(found) == ["noise", "inverted", "shuffled"]
    for name, images in found.items():
        assert images.shape == x.shape
        assert 0 <= images.min() < images.max() <= 1
        assert torch.equal(images, again[name])
        assert torch.equal(images, other[name]) == (name == "inverted")
    assert torch.equal(found["inverted"], 1 - x)
    noise = made.noise(torch.zeros(100, 1, 8, 8), torch.Generator().manual_seed(0)).flatten()
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0.5, 12**-0.5), abs=0.02)  # 6,400 draws


def test_shuffled_images_keep_their_pixels_whole(x: Tensor) -> None:
    moved = made.shuffled(x, torch.Generator().manual_seed(0))

    def pixels(image: Tensor) -> list[Any]:
        return image.flatten(1).T.tolist()  # (H W, C)

    orders = []
    for before, after in zip(x, moved, strict=True):
        assert sorted(pixels(before)) == sorted(pixels(after))
        orders.append([pixels(before).index(pixel) for pixel in pixels(after)])
    assert all(orders[0] != order for order in orders[1:])
    assert all(sorted(order) == list(range(64)) != order for order in orders)


@pytest.mark.parametrize("channels", [1, 3])
def test_other_sets_are_brought_to_the_images_shape(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One colour per image, so that scaling changes nothing; grey as Pillow has it."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 3), dtype=np.uint8)
    images = np.broadcast_to(colours[:, :, None, None], (9, 3, 32, 32)).copy()
    monkeypatch.setattr(sources, "torchvision_split", lambda *_: (images, np.zeros(9, np.int64), ("a",)))
    x = torch.zeros(6, channels, 8, 8)
    found, _ = ood.choose(x, DIGITS, ReliabilitySettings(ood="svhn"))
    assert found["svhn"].shape == x.shape
    seen = {tuple(np.rint(255 * image[:, 0, 0].numpy()).astype(int)) for image in found["svhn"]}
    grey = np.asarray(Image.fromarray(colours[None]).convert("L"))[0][:, None]
    assert len(seen) == 6
    assert seen <= {tuple(c) for c in (colours if channels == 3 else grey).astype(int).tolist()}


def test_a_folder_is_read_from_its_test_images(tmp_path: Path) -> None:
    for split, level in (("train", 0), ("test", 200)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(np.full((12, 12), level, np.uint8)).save(tmp_path / split / label / "1.png")
    found, missing = ood.choose(torch.zeros(5, 1, 8, 8), DIGITS, ReliabilitySettings(ood_path=str(tmp_path)))
    assert list(found) == [*ood.MADE, "folder"]
    assert missing == {}
    assert torch.equal(found["folder"], torch.full((2, 1, 8, 8), 200 / 255))
    for label in ("a", "b"):
        Image.fromarray(np.eye(12, dtype=np.uint8)).save(tmp_path / "test" / label / "1.png")
    with pytest.raises(DataError, match="no pixel is above 1"):
        ood.choose(torch.zeros(5, 1, 8, 8), DIGITS, ReliabilitySettings(ood_path=str(tmp_path)))


def test_what_auto_cannot_have_is_named_and_what_was_asked_for_is_an_error(x: Tensor, tmp_path: Path) -> None:
    """torchvision itself, on an empty folder: it is left empty, so nothing was fetched."""
    data = DataSettings(source="cifar100", validation=5000, root=str(tmp_path))
    found, missing = ood.choose(x, data, ReliabilitySettings())
    assert list(found) == list(ood.MADE)
    assert missing["svhn"] == f"not available: SVHN is missing or incomplete under {str(tmp_path)!r}"
    assert "ood_path" in missing["folder"]
    assert set(missing) == {"svhn", "folder"}  # cifar100 is the data itself
    assert list(tmp_path.iterdir()) == []
    assert list(ood.choose(x[:, :1], DIGITS, ReliabilitySettings())[0]) == list(ood.MADE)
    for asked in ("folder", "auto"):  # a path asks for what is there
        with pytest.raises(DataError, match=r"ood: 'folder' is unavailable: 'nowhere': there is no such folder"):
            ood.choose(x, data, ReliabilitySettings(ood=asked, ood_path="nowhere"))


def test_a_set_asked_for_by_name_may_be_fetched_and_auto_fetches_nothing(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def absent(name: str, split: str, root: str, download: bool) -> None:
        asked.append((name, split, download))
        raise RuntimeError("no network")

    monkeypatch.setattr(sources, "torchvision_split", absent)
    ood.choose(x, DIGITS, ReliabilitySettings())
    with pytest.raises(DataError, match=r"'cifar10' is unavailable: CIFAR10 is missing .* could not be downloaded: no network"):
        ood.choose(x, DIGITS, ReliabilitySettings(ood=("noise", "cifar10")))
    assert asked == [("SVHN", "test", False), ("CIFAR100", "test", False), ("CIFAR10", "test", True)]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ood=svnh", "did you mean 'svhn'"),
        ("ood=[auto,noise]", "not both"),
        ("ood=folder", "needs `ood_path`"),
        ("{ood: [noise], ood_path: x}", "is for ood 'folder'"),
        ("n=498", "reliability.n: 498 is more than the test split has"),
    ],
)
def test_settings_that_cannot_be(override: str, expected: str) -> None:
    text = f"evaluation.reliability{'=' if override.startswith('{') else '.'}{override}"
    with pytest.raises(ParamsError, match="1 problem ") as caught:
        load(ROOT / "params/digits.yaml", [text])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "override", "expected"),
    [
        ("cifar100", "evaluation.reliability.ood=cifar100", "'cifar100' is the training data"),
        ("cifar10-folder", "evaluation.reliability.ood_path=datasets/cifar10-jpeg.tar.xz", "is data.path"),
    ],
)
def test_the_data_itself_is_not_out_of_distribution(profile: str, override: str, expected: str) -> None:
    with pytest.raises(ParamsError, match=expected):
        load(ROOT / f"params/{profile}.yaml", [override])
