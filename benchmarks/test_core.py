"""The clipped step beside the ordinary one and beside ``vmap(grad)``: the first rows of the tables."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.measure import interleaved, medians, peak_bytes
from benchmarks.modes import MODES
from benchmarks.workloads import WORKLOADS

# Plain vmap has no batching rule for attention's backward and says that it loops; that is the peer's cost.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

ROWS = [("cnn-small", 32), ("cnn-small", 64), ("cnn-medium", 32), ("transformer-small", 32)]


@pytest.mark.parametrize(("workload", "batch_size"), ROWS)
def test_throughput(
    benchmark: Any, workload: str, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {name: make(WORKLOADS[workload], batch_size) for name, make in MODES.items()}
    rounds = 3 if benchmark.disabled else 15
    times = medians(interleaved(steps, rounds))
    benchmark.extra_info |= {name: batch_size / seconds for name, seconds in times.items()}
    benchmark.pedantic(steps["clipped"], rounds=1 if benchmark.disabled else 5)
    with capsys.disabled():
        cells = "   ".join(
            f"{name} {batch_size / seconds:8.1f}/s {100 * times['standard'] / seconds:4.0f} %"
            for name, seconds in times.items()
        )
        print(f"\n{workload:>18} batch {batch_size}: {cells}")


def test_peak_memory(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {name: peak_bytes("transformer-small", name, 32) for name in MODES}
    benchmark.extra_info |= peaks
    benchmark.pedantic(lambda: None)
    with capsys.disabled():
        cells = "   ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items())
        print(f"\n transformer-small batch 32, peak memory: {cells}")
    assert all(peak > 0 for peak in peaks.values())
