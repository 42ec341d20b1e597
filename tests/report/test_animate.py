"""The animation of chains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ebjdat.report.figures import animate


def chains(frames: int, channels: int, side: int, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 5 * classes, channels, side, side)).astype(np.uint8)


def test_the_gif_shows_the_chains_pixel_by_pixel(tmp_path: Path) -> None:
    shown = {"down E(x)": chains(6, 1, 8), "down E(x, y)": 255 - chains(6, 1, 8)}
    for name in ("a.gif", "b.gif"):
        animate(shown, [0, 1, 2, 3, 4, 5], 10, tmp_path / name)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as gif:
        seen = [(np.array(frame.convert("L")), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert [duration for _, duration in seen] == [1000, 250, 250, 250, 250, 2500]
    for t, (picture, _) in enumerate(seen):
        assert picture.shape == (2 * (16 + 4 * 9 * 5), 10 * 9 * 5)
        for block, images in enumerate(shown.values()):
            for row, k in ((0, 0), (3, 9), (1, 4)):  # row r, column k: the r-th chain of class k
                top, left = 16 + block * (16 + 180) + row * 45, k * 45
                tile = np.kron(images[t, row * 10 + k, 0], np.ones((5, 5)))
                assert np.array_equal(picture[top : top + 40, left : left + 40], tile)


@pytest.mark.parametrize(
    ("frames", "side", "classes"), [(25, 8, 10), (11, 32, 10), (25, 32, 10), (11, 64, 10), (11, 32, 100), (25, 64, 10)]
)
def test_the_gif_of_pure_noise_is_below_a_megabyte(frames: int, side: int, classes: int, tmp_path: Path) -> None:
    images = chains(frames, 1 if side == 8 else 3, side, classes)
    animate({"down E(x)": images, "down E(x, y)": images}, list(range(frames)), classes, tmp_path / "c.gif")
    assert (tmp_path / "c.gif").stat().st_size < 1_000_000
    with Image.open(tmp_path / "c.gif") as gif:
        assert gif.n_frames == frames
        assert 300 <= gif.width <= 500 or (frames, side) == (25, 64)  # few columns fit there
