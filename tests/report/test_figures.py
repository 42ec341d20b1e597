"""Figures: what they show, measured where matplotlib draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebjdat.report import inline
from ebjdat.report.figures import sample_grids, save


def test_grids_show_the_first_images_of_each_class_in_its_row(tmp_path: Path) -> None:
    images = np.zeros((6, 1, 8, 8), np.uint8)
    images[:, 0] = np.array([10, 20, 30, 40, 50, 60])[:, None, None]
    figure = sample_grids({"p": (images, np.array([0, 1, 0, 1, 0, 1]))}, ("a", "b"), 2)
    canvas = figure.axes[0].get_images()[0].get_array()
    assert canvas.shape == (17, 17, 3)
    assert [canvas[0, 0, 0], canvas[0, 9, 0], canvas[9, 0, 0], canvas[9, 9, 0]] == [10, 30, 20, 40]
    save(figure, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_class_names_are_drawn_literally(tmp_path: Path) -> None:
    """matplotlib takes "$" for mathematics, and refuses bad formulas."""
    names = ("$\\frac{$", "$x$", "a\nb\x1b[2J", "c" * 300, "caf\udce9")
    figure = sample_grids({"p": (np.zeros((5, 1, 8, 8), np.uint8), np.arange(5))}, names, 1)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["$\\frac{$", "$x$", "a\\nb\\x1b[2J", "c" * 29 + "…", "caf\\udce9"]
    save(figure, tmp_path / "grid.png")


def test_labels_of_radii_do_not_overlap() -> None:
    radii = {"standard": 0.15, "released": 0.075, "like_released": 0.08, "half": 0.075, "far": 0.4}
    figure = inline.radius_sweep({"a": [(0.0, 1.0), (0.6, 0.1)]}, radii, 0.1)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert {text.get_text() for text in figure.axes[0].texts} == {"standard", "released, half", "like_released", "far"}
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [row for _, _, row in inline.label_rows({"a": 0.1, "b": 0.4}, 0.5)] == [0, 0]
