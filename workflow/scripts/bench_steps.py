"""How the cost of a training step grows: in chain steps, in the network's FLOPs, in images per step. Writes a CSV and a plot.

    python workflow/scripts/bench_steps.py --out docs/results/step-cost [--device cpu] [--threads 2] [--precision bf16]

EB-JDAT on JEM++ as params/cifar10.yaml has it, on 32x32x3 images; one quantity varies, the others stay at WRN-10-2, batch 64, 10
chain steps (on a GPU: WRN-28-10, batch 256).
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console

from ebjdat.bench.measure import Case, measure
from ebjdat.files import git_commit
from ebjdat.settings import ModelSettings, TrainingSettings, load, merge
from ebjdat.stages.context import device_for

COLUMNS = ("varied", "model", "batch_size", "chain_steps", "precision", "flops_per_image", "ms_per_step", "ms_low", "ms_high", "n")
PANELS = {
    "chain steps": ("chain_steps", "chain steps (full gradients)", 1.0),
    "model": ("flops_per_image", "GFLOP per image and step", 1e9),
    "images": ("batch_size", "images per step", 1.0),
}


def cases(base: Case, models: list[tuple[int, int]], batches: list[int], steps: list[int]) -> list[tuple[str, Case]]:
    def changed(**changes: Any) -> TrainingSettings:
        return TrainingSettings.model_validate(merge(base.settings.model_dump(), changes))

    found = [("chain steps", replace(base, settings=changed(chain={"steps": n}))) for n in steps]
    found += [("model", replace(base, model=ModelSettings(depth=depth, width=width))) for depth, width in models]
    return found + [("images", replace(base, settings=changed(batch_size=n))) for n in batches]


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3.2), layout="constrained")
    for axis, (varied, (column, label, unit)) in zip(axes, PANELS.items(), strict=True):
        panel(axis, [row for row in rows if row["varied"] == varied], column, label, unit)
    axes[0].set_ylabel("seconds per step")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def panel(axis: Axes, rows: list[dict[str, Any]], column: str, label: str, unit: float) -> None:
    x = np.array([row[column] for row in rows]) / unit
    y, low, high = (np.array([row[name] for row in rows]) / 1e3 for name in ("ms_per_step", "ms_low", "ms_high"))
    slope, offset = np.polyfit(x, y, 1)
    left = 1 - ((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    axis.errorbar(x, y, [y - low, high - y], fmt="o", capsize=3, color="#1f5fa8")
    line = np.array([0, x.max()])
    axis.plot(line, slope * line + offset, color="#888888", linewidth=1, label=f"line, R² = {left:.3f}")
    axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    if column == "flops_per_image":
        for row, a, b in zip(rows, x, y, strict=True):
            axis.annotate(row["model"], (a, b), xytext=(-5, 5), textcoords="offset points", fontsize=7, ha="right")


def main(
    out: Annotated[Path, typer.Option(help="Without ending; .csv and .png are added.")],
    device_name: Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "bf16",
    repeats: Annotated[int, typer.Option(help="Timings of each.", min=3)] = 5,
) -> None:
    """How the cost of a training step grows: in chain steps, in the network's FLOPs, in images per step."""
    device = device_for(device_name, threads)
    large = device.type == "cuda"
    overrides = [f"training.compute.precision={precision}", f"training.compute.compile={str(large).lower()}"]
    profile = load(Path("params/cifar10.yaml"), overrides)
    settings = TrainingSettings.model_validate(
        merge(profile.training_settings("eb_jdat").model_dump(), {"batch_size": 256 if large else 64, "chain": {"buffer": 1000}})
    )
    base = Case("eb_jdat", settings, ModelSettings(depth=28 if large else 10, width=10 if large else 2), device, (3, 32, 32), 10, 4000)
    models = [(10, 2), (16, 4), (28, 4), (16, 8), (28, 10)] if large else [(10, 1), (10, 2), (16, 2), (22, 2)]
    rows: list[dict[str, Any]] = []
    for varied, case in cases(base, models, [64, 128, 256, 512] if large else [16, 32, 64, 128], [1, 2, 5, 10, 20]):
        found = measure(case, repeats=repeats)
        images = case.settings.batch_size
        low, high = (1e3 * images / rate for rate in reversed(found["spread"]["images_per_s"]))
        row = (varied, found["case"]["model"], images, case.settings.chain.steps, precision, found["flops_per_image"])
        rows.append(dict(zip(COLUMNS, (*row, found["ms_per_step"], low, high, found["n"]), strict=True)))
        Console(stderr=True).print(rows[-1])
        machine = found["machine"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {precision}, {git_commit()[:7]}"
    draw(rows, out.with_suffix(".png"), f"EB-JDAT on JEM++: {where}")


if __name__ == "__main__":
    typer.run(main)
