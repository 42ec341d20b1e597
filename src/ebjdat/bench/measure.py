"""Times of one training step: the pipeline's, part by part, beside a naive one and beside what the machine can do."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ebjdat import registry
from ebjdat.bench import naive
from ebjdat.data.batches import Batch, DeviceData, epoch_batches, generator
from ebjdat.data.prepared import Prepared
from ebjdat.models import wrn
from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import autocast, frozen_parameters, tensor_cores
from ebjdat.objectives.sampling import PLANNED_STEPS, SamplingState
from ebjdat.pixels import internal_from_unit, unit_from_uint8
from ebjdat.progress import Bar
from ebjdat.samplers.buffer import Plan
from ebjdat.samplers.chains import starter
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import ModelSettings, TrainingSettings
from ebjdat.training.state import Job, Learner
from ebjdat.training.step import Step
from ebjdat.training.updates import When

PARTS = {"negatives": "chain"}  # kind of sample -> name of its part, where that is another
LEAST_SECONDS = 0.5  # of one timing: short steps are timed several at once
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """What is measured. shape: (C, H, W) of images; they are random, since speed does not depend on what they show. n: how many."""

    method: str
    settings: TrainingSettings
    model: ModelSettings
    device: torch.device
    shape: tuple[int, int, int]
    classes: int
    n: int

    def data(self) -> Prepared:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.n, *self.shape), dtype=np.uint8)
        labels = np.arange(self.n, dtype=np.int64) % self.classes
        means = np.full((self.classes, *self.shape), 0.5, dtype=np.float32)
        every = np.arange(self.n)
        return Prepared(images, labels, every, every[:1], every[:1], means, tuple(map(str, range(self.classes))), "random")


class PipelineStep:
    """The step of the training loop, one batch after another."""

    def __init__(self, case: Case, data: Prepared) -> None:
        settings, device = case.settings, case.device
        self.case, self.data = case, DeviceData(data, "train", device)
        model = wrn.build(case.model, case.shape[0], case.classes, 0)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train(settings.mode == "train")
        self.pool = StartPool.of(self.data, torch.from_numpy(data.class_mean))
        self.learner = Learner.of(self.model, Job("bench", case.method, settings, 0, Path()), self.pool)
        self.step = Step(case.method, settings, self.model, self.learner.optimizer, self.learner.own)
        self.noise = generator(device, "bench")
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False) if settings.teacher else None  # as large as the student
        self.when = When(0, self.noise)
        self.work = self._work()

    def _work(self) -> Iterator[tuple[Batch, SamplingState]]:
        settings, buffer, epoch, step = self.case.settings, self.learner.buffer, 0, 0
        plan, common = self.plan(), SamplingState.of_epoch(settings, buffer, self.pool, settings.epochs, self.teacher)
        while True:
            for batch in epoch_batches(self.data, settings.batch_size, settings.augment, 0, epoch, own_density=settings.own_density):
                chains = None if buffer is None or plan is None else buffer.take(plan, step % PLANNED_STEPS)
                yield batch, replace(common, chains=chains)
                step += 1
            epoch += 1

    def __call__(self) -> None:
        batch, state = next(self.work)
        self.step.update(batch, self.step.sample(batch, state, self.noise), self.when)

    def plan(self) -> Plan | None:
        """What training does for PLANNED_STEPS steps at once. Steps here use one plan over and over; its time is added to theirs."""
        buffer, spec = self.learner.buffer, self.case.settings.chain
        if buffer is None:
            return None
        return buffer.plan(
            PLANNED_STEPS, self.case.settings.chains, spec.reinit, starter(spec, self.pool), generator(self.case.device, "plan")
        )


class NaiveStep:
    """The step of `naive`, with a loader, buffer and fresh chains of its own."""

    def __init__(self, case: Case, data: Prepared) -> None:
        naive.check(case.method, case.settings)
        self.case = case
        self.model = wrn.build(case.model, case.shape[0], case.classes, 0).to(case.device)
        self.optimizer = registry.load(registry.OPTIMIZERS, case.settings.optimizer.name)(self.model.parameters(), case.settings.optimizer)
        workers = 4 if case.device.type == "cuda" else 0  # on a CPU they would take the cores that compute
        settings, augment = case.settings, case.settings.augment
        self.labelled = naive.endless(*data.split("train"), settings.batch_size, augment, augment.labelled_noise, workers)
        self.density = naive.endless(*data.split("train"), settings.chains, augment, augment.noise, workers)
        self.fresh, self.buffer = [], torch.zeros(case.settings.chain.buffer, *case.shape)
        if registry.METHODS[case.method].has_chains:
            x = internal_from_unit(unit_from_uint8(torch.from_numpy(data.images)))
            self.fresh = naive.class_distributions(x, torch.from_numpy(data.labels), case.device)

    def __call__(self) -> None:
        case = self.case
        x, y = (value.to(case.device) for value in next(self.labelled))
        x_density = next(self.density)[0].to(case.device)
        random = naive.randomness(x, len(x_density), self.buffer, self.fresh, case.settings.chain.reinit)
        naive.step(case.method, self.model, self.optimizer, (x, x_density, y), self.buffer, random, case.settings)


def measure(case: Case, against_naive: bool = False, repeats: int = 5) -> dict[str, Any]:
    """All figures of `ebjdat bench` as one dict: rates in images per second, times in ms, sizes in bytes.

    Medians over `repeats` timings, in which the two steps alternate; "spread" has the quartiles. Raises NaiveError if `naive`
    does not implement this method or setting.
    """
    if against_naive:
        naive.check(case.method, case.settings)
    torch.compiler.reset()  # programs of other cases would count towards the limit of recompilations
    data, batch_size = case.data(), case.settings.batch_size
    with Bar("bench", 2 + repeats * (2 if against_naive else 1)) as bar:
        step = PipelineStep(case, data)
        bar.line("measuring the machine's rate, warming up")
        rate, how = matrix_rate(case.device, case.settings.compute.precision)
        bar.advance()
        planned = median(timed(step.plan, case.device, 1) for _ in range(3)) / PLANNED_STEPS
        each = warm(step, case.device)
        peak = peak_memory(step, case.device)
        flops = step_flops(step) / batch_size
        parts, outside = parts_of(step, planned, repeats)
        bar.advance()
        reference = NaiveStep(case, data) if against_naive else None
        reference_each = warm(reference, case.device, 2) if reference else 1
        fast, slow = [], []
        for _ in range(repeats):
            fast.append(timed(step, case.device, each) + planned)
            bar.advance()
            if reference:
                slow.append(timed(reference, case.device, reference_each))
                bar.advance()
    rate, how = max((rate, how), matrix_rate(case.device, case.settings.compute.precision))  # other programs may have slowed the first
    return {
        **rates(batch_size, fast, slow, flops, rate),
        "ms": parts,
        "outside_network": outside,
        "matrix_rate_by": how,
        "peak_memory_bytes": peak,
        "steps_per_timing": each,
        "case": described(case),
        "machine": machine(case.device),
    }


def rates(batch_size: int, fast: Sequence[float], slow: Sequence[float], flops_per_image: float, matrix_rate: float) -> dict[str, Any]:
    """Medians and quartiles from seconds per step: of the pipeline (fast), and of the naive steps timed in turn (slow; may be empty)."""
    images, naive_images = ([batch_size / seconds for seconds in times] for times in (fast, slow))
    ratios = [b / a for a, b in zip(fast, slow, strict=True)] if slow else []
    spread = {"images_per_s": images, "naive_images_per_s": naive_images, "speedup": ratios}
    return {
        "images_per_s": median(images),
        "ms_per_step": 1e3 * median(fast),
        "flops_per_image": flops_per_image,
        "matrix_rate_flops": matrix_rate,
        "mfu": flops_per_image * median(images) / matrix_rate,
        "naive_images_per_s": median(naive_images) if naive_images else None,
        "speedup": median(ratios) if ratios else None,
        "spread": {name: quartiles(values) for name, values in spread.items() if values},
        "n": len(fast),
    }


def described(case: Case) -> dict[str, Any]:
    return {
        "method": case.method,
        "model": case.model.title,
        "batch_size": case.settings.batch_size,
        "image_shape": list(case.shape),
        "settings": case.settings.model_dump(mode="json"),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def quartiles(values: Sequence[float]) -> list[float]:
    return [float(np.quantile(values, q)) for q in (0.25, 0.75)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds per call, the device's work included."""
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - began) / times


def warm(work: Callable[[], object], device: torch.device, times: int = WARM_UP) -> int:
    """Call until compiled and cached; returns how many calls make a timing of at least LEAST_SECONDS."""
    for _ in range(times):
        seconds = timed(work, device, 1)
    return max(1, min(100, round(LEAST_SECONDS / seconds)))


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes at most in use while working: the GPU's allocations, or the whole process's resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted anew
        work()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except OSError:
        work()
        return int(psutil.Process().memory_info().rss)


class FlopCount(TorchDispatchMode):
    """Adds up what torch.utils.flop_counter knows of each operation. (FlopCounterMode itself cannot follow autograd.grad.)"""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def step_flops(bench: PipelineStep) -> int:
    """Floating-point operations of a step's convolutions and matrix products, as torch counts those it dispatches."""
    compute = bench.case.settings.compute.model_copy(update={"compile": False, "recompute": False})  # what is repeated is no work done
    settings = bench.case.settings.model_copy(update={"compute": compute})
    step = Step(bench.case.method, settings, bench.model, bench.learner.optimizer, bench.learner.own)
    batch, state = next(bench.work)
    with FlopCount() as counter:
        step.update(batch, step.sample(batch, state, bench.noise), bench.when)
    return counter.flops


def parts_of(bench: PipelineStep, planned: float, repeats: int) -> tuple[dict[str, float], float]:
    """ms of a step's parts, each waited for; and the share of the step outside the network's passes.

    The network's own passes are timed bare: the chain's and the adversaries' gradients on a fixed batch; in the update all
    but the optimiser counts as theirs.
    """
    device, step = bench.case.device, bench.step
    names = registry.METHODS[bench.case.method].samples
    seconds: dict[str, list[float]] = {name: [] for name in ("data", *(PARTS.get(n, n) for n in names), "update")}
    held: dict[str, Any] = {}

    def fetch() -> None:
        held["work"] = next(bench.work)

    def sample(name: str) -> None:
        batch, state = held["work"]
        state = replace(state, made={n: held[n] for n in names if n in held})
        held[name] = step.sample(batch, state, bench.noise, [name])[name]

    for _ in range(repeats):
        seconds["data"].append(timed(fetch, device, 1) + planned)
        for name in names:
            seconds[PARTS.get(name, name)].append(timed(lambda n=name: sample(n), device, 1))  # type: ignore[misc]
        seconds["update"].append(timed(lambda: step.update(held["work"][0], {n: held[n] for n in names}, bench.when), device, 1))
    parts = {name: median(values) for name, values in seconds.items()}
    outside = parts["data"] + median(timed(bench.learner.optimizer.step, device, 1) for _ in range(repeats))
    for name in names:
        outside += max(0.0, parts[PARTS.get(name, name)] - bare_passes(bench, held["work"][0], name, repeats))
    return {name: 1e3 * value for name, value in parts.items()}, outside / sum(parts.values())


def bare_passes(bench: PipelineStep, batch: Batch, name: str, repeats: int) -> float:
    """Seconds that sampling `name` spends in the network alone."""
    settings, model = bench.case.settings, bench.model
    chain = name == "negatives"
    mode = settings.chain.mode if chain else settings.adversary.mode
    steps = {"negatives": settings.chain.steps, "adversarial": settings.adversary.steps}.get(name, 0)  # contrast: 0 at the beginning
    through_trunk = chain and settings.chain.sampler == "pyld"
    precision = settings.compute.precision

    def passes() -> None:
        with bench.step.computing(), autocast(bench.case.device, precision), frozen_parameters(model, mode):
            x = (model.stem(batch.x) if through_trunk else batch.x).detach().requires_grad_(True)
            for _ in range(steps):
                passed = model.trunk(x) if through_trunk else model(x)
                torch.autograd.grad(marginal_energy(passed).sum(), x)

    return median(timed(passes, bench.case.device, 1) for _ in range(repeats))


def matrix_rate(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP per second of the fastest product of large matrices, or 3x3 convolution, that this machine does; and which it was."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    best = (0.0, "")
    with tensor_cores(precision), torch.no_grad():
        for n in sizes:
            a = torch.randn(n, n, device=device, dtype=dtype)
            best = max(best, (2 * n**3 / fastest(partial(torch.matmul, a, a), device), f"matrix product of {n}"))
        for channels, size in ((128, 8), (320, 16), (640, 8)) if device.type == "cuda" else ((128, 8), (256, 8)):
            images = 256 if device.type == "cuda" else 64
            x = torch.randn(images, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            flops = 2 * images * channels**2 * 9 * size**2
            best = max(best, (flops / fastest(partial(F.conv2d, x, w, padding=1), device), f"3x3 convolution, {channels} channels"))
    return best


def fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    times = warm(work, device)
    return min(timed(work, device, max(1, times // 5)) for _ in range(5))
