"""Metrics of the report, of `ebjdat bench`, and of the machine."""

from __future__ import annotations

from ebjdat.metrics.parts import GPU, NAIVE, SEEDS, of
from ebjdat.vocabulary import Metric

M = Metric

# A table, an entry after the other: not one argument a line.
# fmt: off
OTHER: tuple[Metric, ...] = (
    *of(
        "report",
        M("train_seconds", "seconds", "lower", "`finetune_seconds` plus `pretrain_seconds` of its (shared) pretraining", summary=14,
          dvc=True, label="train s"),
        M("seeds", "count", "", "seeds behind a row of `table.csv`"),
        M("<column>_(low|high)", "as the column", "", "95 % interval: over seeds, or of one seed's count or standard error",
          "the column has one"),
        M("<column>_sd", "as the column", "", "standard deviation over seeds", SEEDS),
        M("<column>_n", "count", "", "examples or samples behind the column", "the column has one"),
        M("<column>_paper", "as the column", "", "the paper's number", "the profile's data are the paper's"),
        M("collapses", "count", "lower", "seeds whose training diverged"),
        M("collapse_epochs", "list of epochs", "", "their `collapse_epoch`, separated by spaces"),
    ),
    *of(
        "bench",
        M("images_per_s", "images per second", "higher", "of whole steps, as the training loop takes them: median over `n` timings"),
        M("ms_per_step", "milliseconds", "lower", "the same, per step"),
        M("ms", "milliseconds", "lower",
          "parts, each synchronised, so that they may add up to more than a step: `data` (batch, augmentation, where chains come from), "
          "`chain`, `adversarial`, `update` (losses, gradients, optimiser)"),
        M("outside_network", "fraction", "lower",
          "share of the step that is not a pass through the network: what is left when the passes alone are timed on a fixed batch"),
        M("flops_per_image", "FLOP", "",
          "floating-point operations of a step's convolutions and matrix products, counted by torch as it dispatches them, per image"),
        M("matrix_rate_flops", "FLOP per second", "",
          "the fastest of some large matrix products and 3×3 convolutions in the step's precision, measured in the same run"),
        M("matrix_rate_by", "text", "", "which of them was fastest"),
        M("mfu", "fraction", "higher", "the step's share of that rate"),
        M("peak_memory_bytes", "bytes", "lower",
          "GPU: most allocated; CPU: the process's resident memory at its highest (on other systems than Linux: after a step)"),
        M("naive_images_per_s", "images per second", "", "of a plain implementation of the step, timed in turns with this one", NAIVE),
        M("speedup", "number", "higher", "the plain implementation's time over this one's: median of the pairs' ratios", NAIVE),
        M("spread", "as the name", "", "quartiles over the timings, of `images_per_s`, `naive_images_per_s`, `speedup`"),
        M("n", "count", "", "timings"),
        M("steps_per_timing", "count", "", "steps of one timing, enough to take half a second"),
        M("case", "settings", "", "method, network, batch, image shape and every setting of the step"),
        M("machine", "mapping", "", "what it ran on: device, threads, versions of torch and Python"),
    ),
    *of(
        "system",
        M("system/cpu_utilization_percentage", "percent", "", "processors in use"),
        M("system/system_memory_usage_megabytes", "megabytes", "", "memory in use"),
        M("system/system_memory_usage_percentage", "percent", "", "memory in use"),
        M("system/process_cpu_utilization_percentage", "percent of one", "", "processors that the stage's own process has in use"),
        M("system/process_memory_usage_megabytes", "megabytes", "lower", "resident memory of the stage's own process"),
        M("system/gpu_<gpu>_utilization_percentage", "percent", "", "how busy the GPU is", GPU),
        M("system/gpu_<gpu>_memory_usage_(megabytes|percentage)", "megabytes, percent", "", "GPU memory in use", GPU),
        M("system/gpu_<gpu>_power_usage_watts", "watts", "", "power that the GPU draws", GPU),
    ),
)
# fmt: on
