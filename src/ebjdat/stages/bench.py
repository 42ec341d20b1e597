"""`ebjdat bench`: settings of an experiment -> how fast its training step is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebjdat.bench.measure import Case, measure
from ebjdat.files import git_commit, write_json
from ebjdat.stages.context import Context

# For data of the source `folder`, whose sizes only the files tell.
USUAL_SHAPE, USUAL_CLASSES, USUAL_IMAGES = (3, 32, 32), 10, 45_000


def case_of(context: Context, experiment: str, threads: int | None) -> Case:
    """An experiment's training step, on images of its profile's shape."""
    profile = context.profile
    entry, settings = profile.experiments[experiment], profile.training_settings(experiment)
    record = profile.data.record
    shape, classes = record.shape or USUAL_SHAPE, record.classes or USUAL_CLASSES
    if profile.data.size is not None:
        shape = (3, profile.data.size, profile.data.size)
    network, n = profile.model_settings(entry.pretraining), profile.data.training_size() or USUAL_IMAGES
    return Case(entry.method, settings, network, context.device(threads), shape, classes, n)


def run(
    context: Context, experiment: str, against_naive: bool, repeats: int, out: Path | None, threads: int | None
) -> tuple[dict[str, Any], Path]:
    """Measure and save; returns the result and its file."""
    case = case_of(context, experiment, threads)
    result = {**measure(case, against_naive, repeats), "git_commit": git_commit()}
    compute = case.settings.compute
    words = [experiment, f"{case.model.variant}{case.model.depth}-{case.model.width}", f"batch{case.settings.batch_size}", case.device.type]
    words += [compute.precision, *(["compiled"] if compute.compile else [])]
    out = out or Path("benchmarks/steps") / f"{'-'.join(words)}.json"
    write_json(out, result)
    return result, out


def table_rows(result: dict[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """A result of `measure` as rows (name, (median, quartiles))."""
    spread = result["spread"]

    def between(name: str, form: str) -> str:
        return " to ".join(format(value, form) for value in spread[name])

    rows = [("images/s", (f"{result['images_per_s']:.1f}", between("images_per_s", ".1f")))]
    if result["speedup"] is not None:
        rows += [
            ("images/s, naive step", (f"{result['naive_images_per_s']:.1f}", between("naive_images_per_s", ".1f"))),
            ("times as fast", (f"{result['speedup']:.2f}", between("speedup", ".2f"))),
        ]
    rows += [(f"ms of {name}, waited for", (f"{value:.1f}", "")) for name, value in result["ms"].items()]
    return [
        ("ms per step", (f"{result['ms_per_step']:.1f}", "")),
        *rows,
        ("share of the step outside the network", (f"{result['outside_network']:.1%}", "")),
        ("peak memory, MiB", (f"{result['peak_memory_bytes'] / 2**20:.0f}", "")),
        ("GFLOP per image", (f"{result['flops_per_image'] / 1e9:.3g}", "")),
        (f"GFLOP/s of the machine ({result['matrix_rate_by']})", (f"{result['matrix_rate_flops'] / 1e9:.0f}", "")),
        ("share of the machine's rate (mfu)", (f"{result['mfu']:.1%}", "")),
    ]
