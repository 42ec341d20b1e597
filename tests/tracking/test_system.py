"""System metrics."""

from __future__ import annotations

import time

from ebjdat.tracking.system import sampling


def test_samples_of_the_machine_come_at_their_time_and_at_the_end() -> None:
    found: list[dict[str, float]] = []
    with sampling(found.append, seconds=0.1):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            sum(range(1000))
    assert len(found) >= 2
    assert all(0 < sample["system/system_memory_usage_percentage"] < 100 for sample in found)
    assert found[0]["system/process_cpu_utilization_percentage"] > 10
