"""Figures of the page as inline SVG: they adopt the page's colours, light or dark, and stay sharp at any size."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ebjdat.report.figures import COLOURS, Values, draw_histograms
from ebjdat.report.format import cell, header
from ebjdat.vocabulary import Metric

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")  # c0 to c6 in the page's style
THEME = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(PALETTE)},
    "#999999": "var(--soft)",
    "#666666": "var(--soft)",
    "#bbbbbb": "var(--faint)",
}
LETTER = 0.0115  # width of a letter over the radius plot, as a fraction of its axis
WIDTH, ROW = 300, 36  # of a panel of the trilemma, and of a row in it


def inline(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an <svg>, without size, so that it fills its place. name: makes its ids unique in the page."""
    memory = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(memory, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = memory.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size
    text = f'<svg {size[0]} role="img" aria-label="{escape(label)}"' + text[text.index(">") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"#[0-9a-f]{6}\b", lambda colour: THEME.get(colour[0], colour[0]), text)
    return Markup(re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text))  # noqa: S704 (matplotlib escapes text)


def energies(groups: Mapping[str, Mapping[str, Values]]) -> Figure:
    """Below each other, E(x) and E(x, y): clean, adversarial and generated images on one axis. groups: title -> group -> energies."""
    figure, axes = plt.subplots(len(groups), 1, figsize=(4.4, 1.9 * len(groups)), squeeze=False, layout="constrained")
    for axis, (title, values) in zip(axes[:, 0], groups.items(), strict=True):
        draw_histograms(axis, title, values, histtype="stepfilled", alpha=0.4)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower left")
    return figure


def training_curves(frame: pd.DataFrame) -> Figure:
    """Validation accuracy after each epoch, and below it the mean energies of the training batches."""
    figure, axes = plt.subplots(2, 1, figsize=(4.4, 3.8), layout="constrained", sharex=True)
    accuracies = {"validation_clean_acc": ("clean", "validation, clean"), "validation_robust_acc": ("adversarial", "validation, PGD")}
    for name, (colour, label) in accuracies.items():
        if name in frame and frame[name].notna().any():
            axes[0].plot(frame["epoch"], 100 * frame[name], color=COLOURS[colour], label=label)
    for name in COLOURS:
        if f"energy_{name}" in frame and frame[f"energy_{name}"].notna().any():
            axes[1].plot(frame["epoch"], frame[f"energy_{name}"], color=COLOURS[name], label=name)
    axes[0].set(ylim=(0, 102), ylabel="accuracy, %")
    axes[1].set(xlabel="epoch", ylabel="mean energy, nats")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return figure


def radius_sweep(curves: Mapping[str, Sequence[Sequence[float]]], radii: Mapping[str, float], chance: float) -> Figure:
    """Accuracy under PGD against the radius. curves: title -> [(radius in [0, 1] pixels, accuracy)]; radii: dotted, by name."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4 + 0.16 * len(curves) / 3), layout="constrained")
    for i, (title, points) in enumerate(curves.items()):
        at, accuracy = np.asarray(points).T
        style = ("-", "--", ":", "-.")[i // len(PALETTE) % 4]
        axis.plot(at, 100 * accuracy, style, marker="o", markersize=3, color=PALETTE[i % len(PALETTE)], label=title)
    axis.axhline(100 * chance, color="#bbbbbb", linewidth=1)
    axis.set(ylim=(0, 101), xlabel="radius, [0, 1] pixels", ylabel="accuracy under PGD, %")
    right = min(5 * max(radii.values()), 1.04 * max(points[-1][0] for points in curves.values()))
    axis.set_xlim(0, right)
    for radius, label, row in label_rows(radii, right):
        axis.axvline(radius, color="#999999", linestyle=":", linewidth=1)
        axis.annotate(
            label,
            (radius, 101),
            xytext=(0, 2 + 10 * row),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="bottom",
            color="#666666",
            annotation_clip=False,
        )
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower left")
    return figure


def label_rows(radii: Mapping[str, float], right: float) -> list[tuple[float, str, int]]:
    """(radius, label, row) of each radius, row 0 lowest: labels that would overlap have different rows.

    right: the axis' end. Protocols of one radius share a label.
    """
    names: dict[float, list[str]] = {}
    for name, radius in sorted(radii.items(), key=lambda item: item[1]):
        same = next((known for known in names if abs(known - radius) < 1e-9), radius)
        names.setdefault(same, []).append(name)
    ends: list[float] = []  # of the last label in each row
    rows = []
    for radius, shared in names.items():
        label = ", ".join(shared)
        half = right * LETTER * (len(label) + 2) / 2
        row = next((i for i, end in enumerate(ends) if end <= radius - half), len(ends))
        ends[row : row + 1] = [radius + half]
        rows.append((radius, label, row))
    return rows


def trilemma(table: pd.DataFrame, metric: Metric) -> Markup:
    """One panel: a row per experiment with its value, its 95 % interval (thick) and the paper's number (hollow)."""
    scale = 100 if metric.percent else 1
    low, high, paper = (table.get(f"{metric.name}_{part}", pd.Series(np.nan, table.index)) * scale for part in ("low", "high", "paper"))
    values = table[metric.name] * scale
    top = 100.0 if metric.percent else 1.05 * float(np.nanmax(pd.concat([values, high, paper])) or 1)
    head = header(metric, table)

    def x(value: float) -> str:
        return f"{8 + (WIDTH - 16) * min(max(value / top, 0), 1):.1f}"

    parts = []
    for i, (at, record) in enumerate(table.iterrows()):
        name, y = escape(record["experiment"]), i * ROW
        label = f"{name}: {escape(head)}: {cell(record, metric)}"
        if "±" in label:  # the bar is the interval, not the spread
            label += f", 95 % interval [{low[at]:.2f}, {high[at]:.2f}]"
        inside = f'<rect x="-4" y="{y}" width="{WIDTH + 8}" height="{ROW - 2}" rx="4"/><text x="0" y="{y + 14}">{name}</text>'
        if np.isfinite(values[at]):
            shown = cell(record, metric).split(" ")[0]
            inside += f'<text x="{WIDTH}" y="{y + 14}" text-anchor="end" class="value">{shown}</text>'
            inside += f'<path class="track" d="M8 {y + 25}H{WIDTH - 8}"/>'
            if np.isfinite(low[at]):
                inside += f'<path class="interval" d="M{x(low[at])} {y + 25}H{x(high[at])}"/>'
            inside += f'<circle cx="{x(values[at])}" cy="{y + 25}" r="5"/>'
        else:
            inside += f'<text x="{WIDTH}" y="{y + 14}" text-anchor="end">not measured</text>'
        if np.isfinite(paper[at]):
            inside += f'<circle class="paper" cx="{x(paper[at])}" cy="{y + 25}" r="6"/>'
        find = f'data-find="{name} {escape(record["method"])}" data-kind="{escape(record["method"])}"'
        parts.append(f'<g class="point" role="img" aria-label="{label}" {find}><title>{label}</title>{inside}</g>')
    bottom = len(table) * ROW + 12
    ends = (("start", 8, 0.0), ("middle", WIDTH / 2, top / 2), ("end", WIDTH - 8, top))
    axis = "".join(f'<text class="axis" x="{at}" y="{bottom}" text-anchor="{anchor}">{value:.3g}</text>' for anchor, at, value in ends)
    kind = f'class="{metric.better}" role="group" aria-label="{escape(head)}"'
    return Markup(f'<svg viewBox="0 0 {WIDTH} {bottom + 4}" {kind}>{"".join(parts)}{axis}</svg>')  # noqa: S704 (names are escaped above)
