"""Interleaved times in one process, peak memory in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    steps: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every step in every round; a round runs each step once, so that noise hits all alike."""
    for _ in range(warm_up):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in times.items()}


def peak_bytes(workload: str, mode: str, batch_size: int, steps: int = 3) -> int:
    """High-water mark that the steps of one mode add to a fresh process on the CPU."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure",
        workload,
        mode,
        str(batch_size),
        str(steps),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak"])


def _high_water_mark() -> int:
    """Peak resident bytes of this process alone; ``getrusage`` would start from the parent's."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _main() -> None:
    from benchmarks.modes import MODES
    from benchmarks.workloads import WORKLOADS

    workload, mode, batch_size, steps = sys.argv[1:]
    torch.randn(64, 64).mm(torch.randn(64, 64))  # libraries loaded, thread pools made
    before = _high_water_mark()
    step = MODES[mode](WORKLOADS[workload], int(batch_size))
    for _ in range(int(steps)):
        step()
    print(json.dumps({"peak": _high_water_mark() - before}))


if __name__ == "__main__":
    _main()
