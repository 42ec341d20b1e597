"""`ebjdat bench`: settings of an experiment -> how fast its training step is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebjdat import params
from ebjdat.bench.measure import Case, measure
from ebjdat.files import git_commit, write_json
from ebjdat.params import ModelSettings, ParamsError, TrainingSettings, merge
from ebjdat.stages.context import Context, device_for

# source of a profile's data -> (channels, height, width), classes, training images where the settings do not say
SIZES = {"digits": ((1, 8, 8), 10, 1000), "cifar10": ((3, 32, 32), 10, 45_000), "cifar100": ((3, 32, 32), 100, 45_000)}


@dataclass(frozen=True)
class Wanted:
    """What is measured; None: as the profile says. model: "DEPTH-WIDTH"."""

    experiment: str
    model: str | None = None
    batch: int | None = None
    device: str | None = None
    against_naive: bool = False
    repeats: int = 5


def case_of(context: Context, wanted: Wanted, threads: int | None) -> Case:
    """Raises ParamsError for an experiment, network or batch that cannot be."""
    profile = context.profile
    if wanted.experiment not in profile.experiments:
        raise ParamsError(f"experiment {wanted.experiment!r} is unknown; {params.nearest(wanted.experiment, list(profile.experiments))}")
    entry = profile.experiments[wanted.experiment]
    network = profile.model_settings(entry.pretraining)
    settings = profile.training_settings(wanted.experiment)
    if wanted.model is not None:
        depth, _, width = wanted.model.partition("-")
        if not (depth.isdigit() and width.isdigit() and int(depth) >= 10 and (int(depth) - 4) % 6 == 0 and int(width)):
            raise ParamsError(
                f"--model {wanted.model!r}: allowed is DEPTH-WIDTH such as 28-10, with a depth of 6 n + 4 (10, 16, 22, 28, ...)"
            )
        network = ModelSettings.model_validate(merge(network.model_dump(), {"depth": int(depth), "width": int(width)}))
    if wanted.batch is not None:
        slices = settings.compute.accumulate
        if wanted.batch % slices:
            raise ParamsError(f"--batch {wanted.batch}: no multiple of the settings' compute.accumulate, {slices}")
        settings = TrainingSettings.model_validate(merge(settings.model_dump(), {"batch_size": wanted.batch}))
    if wanted.device not in (None, "cpu", "cuda", "auto"):
        raise ParamsError(f"--device {wanted.device!r}; allowed: cpu, cuda, auto")
    device = device_for(wanted.device or profile.runtime.device, threads or profile.runtime.threads)
    shape, classes, n = SIZES.get(profile.data.source, SIZES["cifar10"])
    if profile.data.size is not None:
        shape = (3, profile.data.size, profile.data.size)
    return Case(entry.method, settings, network, device, shape, classes, profile.data.training_size() or n)


def run(path: Path, overrides: list[str], wanted: Wanted, out: Path | None, threads: int | None) -> tuple[dict[str, Any], Path]:
    """Measure, save, and return what was measured and where it lies."""
    context = Context.load(path, overrides)
    case = case_of(context, wanted, threads)
    found = {**measure(case, wanted.against_naive, wanted.repeats), "git_commit": git_commit()}
    compute = case.settings.compute
    words = [wanted.experiment, f"wrn{case.model.depth}-{case.model.width}", f"batch{case.settings.batch_size}", case.device.type]
    words += [compute.precision, *(["compiled"] if compute.compile else [])]
    out = out or Path("benchmarks/steps") / f"{'-'.join(words)}.json"
    write_json(out, found)
    return found, out


def told(found: dict[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """What `measure` found, as rows (what, (median, quartiles)) to be read."""
    spread = found["spread"]

    def between(name: str, form: str) -> str:
        return " to ".join(format(value, form) for value in spread[name])

    rows = [("images/s", (f"{found['images_per_s']:.1f}", between("images_per_s", ".1f")))]
    if found["speedup"] is not None:
        rows += [
            ("images/s, plainly written step", (f"{found['naive_images_per_s']:.1f}", between("naive_images_per_s", ".1f"))),
            ("times as fast", (f"{found['speedup']:.2f}", between("speedup", ".2f"))),
        ]
    rows += [(f"ms of {name}, waited for", (f"{value:.1f}", "")) for name, value in found["ms"].items()]
    return [
        ("ms per step", (f"{found['ms_per_step']:.1f}", "")),
        *rows,
        ("share of the step outside the network", (f"{found['outside_network']:.1%}", "")),
        ("peak memory, MiB", (f"{found['peak_memory_bytes'] / 2**20:.0f}", "")),
        ("GFLOP per image", (f"{found['flops_per_image'] / 1e9:.3g}", "")),
        (f"GFLOP/s of the machine ({found['matrix_rate_by']})", (f"{found['matrix_rate_flops'] / 1e9:.0f}", "")),
        ("share of the machine's rate (mfu)", (f"{found['mfu']:.1%}", "")),
    ]
