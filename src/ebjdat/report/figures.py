"""Figures from plain arrays. Colours are the Okabe-Ito set, which colour-blind readers can distinguish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ebjdat.errors import printable

COLOURS = {"clean": "#0072B2", "adversarial": "#D55E00", "generated": "#009E73"}
INK = "#333333"
Images = NDArray[np.uint8]
Values = NDArray[np.float64]
LONGEST = 30  # characters of a class beside its images
GIF_PIXELS = 600_000  # of all frames, enlarged in one direction (repetition compresses): noise then takes 1.4 bytes each
GIF_WIDTH = 450  # pixels at most, where that much is needed

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.dpi": 110,
        "text.parse_math": False,  # a class may be called "$x$"
    }
)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def sample_grids(
    panels: Mapping[str, tuple[Images, NDArray[np.int64]]], classes: Sequence[str], per_class: int, columns: int | None = None
) -> Figure:
    """Per panel the first `per_class` images of each class (one row a class, its name before it); `columns` panels side by side."""
    first = next(iter(panels.values()))[0]
    rows = min(len(classes), 20)
    pixels, gap = first.shape[-1], 1
    inches = max(0.28, min(0.45, 4.5 / rows))
    across = min(columns or len(panels), len(panels))
    down = -(-len(panels) // across)
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in map(printable, classes[:rows])]
    wide = per_class * inches + max(1.0, 0.08 * max(map(len, names)))
    figure, axes = plt.subplots(down, across, figsize=(wide * across, (rows * inches + 0.5) * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, (images, labels)) in zip(axes.flat, panels.items(), strict=False):
        side = pixels + gap
        canvas = np.full((rows * side - gap, per_class * side - gap, 3), 255, np.uint8)
        for k in range(rows):
            for column, image in enumerate(images[labels == k][:per_class]):
                tile = np.broadcast_to(image.transpose(1, 2, 0), (pixels, pixels, 3))
                canvas[k * side : k * side + pixels, column * side : column * side + pixels] = tile
        axis.imshow(canvas, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([k * side + pixels / 2 for k in range(rows)], names)
        axis.tick_params(length=0)
        axis.set_title(title, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure


def energy_histograms(panels: Mapping[str, Mapping[str, Values]]) -> Figure:
    """Panels side by side, title -> group -> energies (N,): clean, adversarial and generated images on one axis."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2.7), layout="constrained")
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        draw_histograms(axis, title, {name: values[np.isfinite(values)] for name, values in groups.items()}, alpha=0.45)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_histograms(axis: Axes, title: str, groups: Mapping[str, Values], **style: Any) -> None:
    """The density of finite energies (N,) of each group, and a line at its mean. What lies beyond the bins is in the outermost."""
    edges = bins(list(groups.values())).tolist()
    for name, values in groups.items():
        if len(values):
            axis.hist(np.clip(values, edges[0], edges[-1]), edges, density=True, color=COLOURS[name], label=name, **style)
            axis.axvline(values.mean(), color=COLOURS[name], linewidth=1.2)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


def bins(groups: Sequence[Values]) -> Values:
    """Edges of 49 equal bins over all but the outermost 0.2 % of these finite values, (N,) each; over [0, 1] where there are none."""
    together = np.concatenate(groups)
    low, high = np.quantile(together, [0.002, 0.998]) if len(together) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1, 50)


def reliability_diagram(curves: Mapping[str, Mapping[str, Values]], title: str) -> Figure:
    """A column per curve: accuracy against confidence, bin by bin, with the diagonal of a calibrated network; below, shares.

    A curve, an array over equal bins of [0, 1] each: `confidence`, `accuracy` and its interval `low` to `high` (nan where a
    bin is empty), and `share`, the fraction of images.
    """
    figure, axes = plt.subplots(
        2,
        len(curves),
        figsize=(3.6 * len(curves), 4.6),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey="row",
        height_ratios=(3, 1),
    )
    smallest = min(share for curve in curves.values() for share in curve["share"] if share)
    for column, (name, curve) in enumerate(curves.items()):
        above, below = axes[:, column]
        at, accuracy = curve["confidence"], curve["accuracy"]
        above.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="calibrated", zorder=1)
        above.vlines(at, curve["low"], curve["high"], color="#BBBBBB", linewidth=1.5, label="95 % interval", zorder=1)
        above.vlines(at, at, accuracy, color=COLOURS["adversarial"], linewidth=3, label="gap", zorder=2)
        above.scatter(at, accuracy, s=30, color=COLOURS["clean"], label="accuracy", zorder=3)
        edges = np.linspace(0, 1, len(at) + 1)
        below.bar(edges[:-1], 100 * curve["share"], edges[1], align="edge", color=COLOURS["clean"], edgecolor="white")
        error = np.nansum(curve["share"] * np.abs(accuracy - at))
        above.set_title(f"{title}: {name}\nECE {100 * error:.1f} %", fontsize=9, loc="left")
        above.set(xlim=(0, 1.02), ylim=(0, 1.02))
        below.set(yscale="log", ylim=(50 * smallest, 130), yticks=(1, 10, 100), yticklabels=("1", "10", "100"), xlabel="confidence")
        below.tick_params(axis="y", which="minor", length=0)
        below.yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("images, %\n(log scale)")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def animate(panels: Mapping[str, Images], steps: Sequence[int], classes: int, path: Path) -> None:
    """Chains on their way, a GIF: per panel a block of chains, one column per class, enlarged without smoothing.

    panels: title -> (T, B, C, H, W), chains that began at the classes in turn; steps: after how many each of the T was seen.
    Ten classes and four chains of each at most, fewer where frames are large or many: the file stays below 1 MB.
    """
    frames, batch, channels, height, width = next(iter(panels.values())).shape
    across = min(classes, batch, 10)
    scale = max(1, GIF_WIDTH // (across * (width + 1)))
    affordable = GIF_PIXELS // (frames * len(panels) * (height + 1) * (width + 1) * scale)  # chains of each panel
    across = max(1, min(across, affordable))
    down = max(1, min(4, batch // classes, affordable // across))
    band = 16  # pixels of a line of text
    pictures = []
    for t, step in enumerate(steps):
        blocks = [_chain_block(chains[t], classes, down, across, scale) for chains in panels.values()]
        canvas = Image.new("RGB", (blocks[0].shape[1], sum(len(block) + band for block in blocks)), "white")
        draw, top = ImageDraw.Draw(canvas), 0
        for title, block in zip(panels, blocks, strict=True):
            draw.text((2, top + 2), f"{title}, step {step} of {steps[-1]}", fill=INK)
            canvas.paste(Image.fromarray(block), (0, top + band))
            top += band + len(block)
        pictures.append(canvas.convert("L") if channels == 1 else canvas.quantize(256, dither=Image.Dither.NONE))
    durations = [1000, *[250] * (frames - 2), 2500]  # milliseconds; start and end are looked at longest
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _chain_block(chains: Images, classes: int, down: int, across: int, scale: int) -> Images:
    """Chains (B, C, H, W) of classes in turn -> one picture (h, w, 3), a column per class, each pixel `scale` wide."""
    _, _, height, width = chains.shape
    block = np.full((down * (height + 1), across * (width + 1), 3), 255, np.uint8)
    for row in range(down):
        for k in range(across):
            y, x = row * (height + 1), k * (width + 1)
            block[y : y + height, x : x + width] = chains[row * classes + k].transpose(1, 2, 0)
    return block.repeat(scale, 0).repeat(scale, 1)
