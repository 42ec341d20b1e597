"""What the machine does while a stage runs, under MLflow's names for system metrics."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import psutil

SECONDS = 10.0  # between two samples


class Sampler:
    """While entered, a thread hands a sample to `report` every few seconds, and a last one at the end."""

    def __init__(self, report: Callable[[dict[str, float]], None], seconds: float = SECONDS) -> None:
        self._report, self._seconds = report, seconds
        self._process, self._gpus = psutil.Process(), _gpus()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="system metrics")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        psutil.cpu_percent()  # the first call of a thread has nothing to compare with
        self._process.cpu_percent()
        while not self._stop.wait(self._seconds):
            self._report(self.sample())
        self._report(self.sample())

    def sample(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_cpu_utilization_percentage": self._process.cpu_percent(),
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        for index, (nvml, gpu) in enumerate(self._gpus):
            # Each by itself: a part of a GPU does not know its power, for example.
            with contextlib.suppress(nvml.NVMLError):
                found[f"gpu_{index}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            with contextlib.suppress(nvml.NVMLError):
                held = nvml.nvmlDeviceGetMemoryInfo(gpu)
                found[f"gpu_{index}_memory_usage_megabytes"] = held.used / 1e6
                found[f"gpu_{index}_memory_usage_percentage"] = 100 * held.used / held.total
            with contextlib.suppress(nvml.NVMLError):
                found[f"gpu_{index}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return {f"system/{name}": round(float(value), 2) for name, value in found.items()}


def _gpus() -> list[tuple[Any, Any]]:
    """NVIDIA's library and a handle for each GPU; none where there is no GPU, or nvidia-ml-py is not installed."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return [(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # the library's own errors, where there is no driver
        return []
