"""The machine's load while a stage runs, under MLflow's names for system metrics."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil

SECONDS = 10.0  # between two samples


@contextlib.contextmanager
def sampling(report: Callable[[dict[str, float]], None], seconds: float = SECONDS) -> Iterator[None]:
    """While entered, a thread passes a sample to `report` every few seconds, and a last one at the end."""
    stop, process, gpus = threading.Event(), psutil.Process(), _gpus()

    def run() -> None:
        _sample(process, gpus)  # the first one of a thread only starts the measurement
        while not stop.wait(seconds):
            report(_sample(process, gpus))
        report(_sample(process, gpus))

    thread = threading.Thread(target=run, daemon=True, name="system metrics")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _sample(process: psutil.Process, gpus: list[tuple[Any, Any]]) -> dict[str, float]:
    memory = psutil.virtual_memory()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "process_cpu_utilization_percentage": process.cpu_percent(),
        "process_memory_usage_megabytes": process.memory_info().rss / 1e6,
    }
    for index, (nvml, gpu) in enumerate(gpus):
        # One by one: a part of a GPU does not know its power, for example.
        with contextlib.suppress(nvml.NVMLError):
            values[f"gpu_{index}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        with contextlib.suppress(nvml.NVMLError):
            held = nvml.nvmlDeviceGetMemoryInfo(gpu)
            values[f"gpu_{index}_memory_usage_megabytes"] = held.used / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * held.used / held.total
        with contextlib.suppress(nvml.NVMLError):
            values[f"gpu_{index}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return {f"system/{name}": round(float(value), 2) for name, value in values.items()}


def _gpus() -> list[tuple[Any, Any]]:
    """NVIDIA's library and a handle for each GPU; none where there is no GPU, or nvidia-ml-py is not installed."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return [(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # the library's own errors, where there is no driver
        return []
