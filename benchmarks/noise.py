"""How long noise takes beside ``Tensor.normal_``, interleaved: ``python -m benchmarks.noise``.

``normal_`` is a statistical generator and only fills one tensor; it is the yardstick, not a substitute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import timed
from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise

SIZES = (10_000, 1_000_000, 10_000_000)
SECONDS = 2.0
"""For each line of the table."""
SMALL = 16
"""Tensors into which the smallest size is cut, as the parameters of a small model are."""


def cases(device: str) -> list[tuple[str, list[Tensor]]]:
    one = [(f"{n:.0e} values", [torch.zeros(n, device=device)]) for n in SIZES]
    small = list(torch.zeros(SMALL, SIZES[0] // SMALL, device=device))
    return [(f"{SIZES[0]:.0e} in {SMALL} tensors", small), *one]


def interleaved(calls: list[Callable[[], None]], device: str) -> list[list[float]]:
    """Seconds of each call in each round; a round runs them all, each round from another one on."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    rounds = 0
    while rounds < 7 or (time.perf_counter() - start < SECONDS and rounds < 2000):
        for index in range(len(calls)):
            at = (index + rounds) % len(calls)
            times[at].append(timed(calls[at], device))
        rounds += 1
    return [taken[2:] for taken in times]


def line(name: str, totals: list[Tensor], device: str) -> str:
    generator = torch.Generator(device).manual_seed(0)
    sources: dict[str, NoiseSource] = {
        "system": SystemNoise(),
        "uncompiled": SystemNoise(compile=False),
        "draws=4": SystemNoise(draws=4),
        "seeded": SeededNoise(generator),
    }
    buffer = torch.empty(sum(total.numel() for total in totals), device=device)

    def add(source: NoiseSource) -> Callable[[], None]:
        return lambda: source.add_gaussian_(totals, 1.0)

    calls: list[Callable[[], None]] = [lambda: buffer.normal_(generator=generator)]
    calls += [add(source) for source in sources.values()]
    for call in calls:
        call()
    base, *others = interleaved(calls, device)
    row = f"{name:22s} {statistics.median(base) * 1e6:10.1f}"
    for taken in others:
        ratio = statistics.median(t / b for t, b in zip(taken, base, strict=True))
        row += f" {statistics.median(taken) * 1e6:10.1f} {ratio:6.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads for this run")
    threads = parser.parse_args().threads
    if threads:
        torch.set_num_threads(threads)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        print(
            f"{device}, {torch.get_num_threads()} threads, float32; microseconds (median) and ratio to normal_"
        )
        print(
            f"{'':22s} {'normal_':>10s} {'system':>17s} {'uncompiled':>17s} {'draws=4':>17s} {'seeded':>17s}"
        )
        for name, totals in cases(device):
            print(line(name, totals, device))


if __name__ == "__main__":
    main()
