"""What correlated noise gains and costs: ``python -m benchmarks.correlated``.

The first table has the error of prefix sums beside independent noise at the same epsilon, for two runs and three
epsilons, as ``PrivacyPlan.expected_error`` computes it. The second has the time of noise beside independent noise.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipgrad import BandedFactorisation, PrivacyPlan, SystemNoise
from clipgrad.factorisation.strategy import banded
from clipgrad.factorisation.toeplitz import square_root
from clipgrad.noise.correlated import CorrelatedNoise
from clipgrad.noise.step_noise import IndependentNoise, StepNoise, StepSums

DELTA = 1e-6
SAMPLES = 100_000
RUNS = ((1000, 4), (2000, 20))
"""Steps and epochs."""
EPSILONS = (1.0, 4.0, 8.0)
Shapes = list[tuple[int, ...]]


def small_cnn() -> Shapes:
    """Two convolutions and three linear layers: 29 thousand values in ten tensors."""
    weights: Shapes = [(16, 1, 3, 3), (32, 16, 3, 3), (64, 288), (64, 64), (10, 64)]
    return [shape for weight in weights for shape in (weight, weight[:1])]


def small_gpt2() -> Shapes:
    """The tensors of a GPT-2 with four layers of width 128: 7.4 million values in 52 tensors."""
    width = 128
    layer: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(4 * layer), (width,), (width,)]


CASES: dict[str, Callable[[], Shapes]] = {
    "1e4": lambda: [(10_000,)],
    "1e5": lambda: [(100_000,)],
    "1e6": lambda: [(1_000_000,)],
    "1e7": lambda: [(10_000_000,)],
    "small CNN": small_cnn,
    "small GPT-2": small_gpt2,
    "1e8": lambda: [(100_000_000,)],
}
CUDA_ONLY = ("1e8",)  # the rows alone would take 12 GB
BANDS = 16


def plan_of(
    steps: int, epochs: int, epsilon: float, mechanism: BandedFactorisation | None
) -> PrivacyPlan:
    return PrivacyPlan.for_epsilon(
        epsilon,
        num_samples=SAMPLES,
        expected_batch_size=SAMPLES * epochs / steps,
        steps=steps,
        delta=DELTA,
        mechanism=mechanism,
    )


def error_table() -> None:
    print(
        f"error of prefix sums relative to independent noise, delta = {DELTA:g}; bands in brackets"
    )
    print(f"{'steps':>6s} {'epochs':>7s} {'epsilon':>8s} {'square root':>14s} {'optimised':>14s}")
    for steps, epochs in RUNS:
        for epsilon in EPSILONS:
            line = f"{steps:6d} {epochs:7d} {epsilon:8g}"
            independent = plan_of(steps, epochs, epsilon, None).expected_error()
            for coefficients in ("square_root", "optimised"):
                plan = plan_of(steps, epochs, epsilon, BandedFactorisation("auto", coefficients))
                assert isinstance(plan.mechanism, BandedFactorisation)
                error = plan.expected_error() / independent
                line += f" {error:8.3f} ({plan.mechanism.count():3d})"
            print(line, flush=True)


def steps_of(
    noise: StepNoise, sums: list[Tensor], clock: Callable[[], float]
) -> Callable[[int], float]:
    """A function that takes so many steps and returns the seconds for one."""
    names = [str(index) for index in range(len(sums))]
    done = 0

    def take(count: int) -> float:
        nonlocal done
        start = clock()
        for _ in range(count):
            noise.next(StepSums(sums, done, names, sigma=1.0, divisor=48.0, in_place=True))
            done += 1
        return (clock() - start) / count

    return take


def time_table(device: str, bands: int, rounds: int, only: Sequence[str]) -> None:
    print(
        f"{device}, {torch.get_num_threads()} threads: microseconds of a step's noise, {bands} bands, float32"
    )
    print(f"{'values':>12s} {'independent':>12s} {'correlated':>12s} {'ratio':>6s}")

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        # Time of this process alone, where other work shares the cores; that of several threads would be their sum.
        alone = device == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    for name, shapes in CASES.items():
        if name not in only and (only or (device == "cpu" and name in CUDA_ONLY)):
            continue
        size = sum(map(math.prod, shapes()))
        takers = []
        for noise in (
            IndependentNoise(SystemNoise()),
            CorrelatedNoise(SystemNoise(), banded(square_root(bands)), "benchmark"),
        ):
            sums = [torch.zeros(shape, device=device) for shape in shapes()]
            takers.append(steps_of(noise, sums, clock))
            takers[-1](2 * bands)  # also what is made ahead, whole blocks of it
        taken: list[list[float]] = [[], []]
        for _ in range(rounds):
            for index, take in enumerate(takers):
                # Whole blocks of what is made ahead.
                block = 16 if device == "cuda" else max(1, min(bands - 1, 16))
                taken[index].append(take(block * max(1, 1_000_000 // size)))
        one, other = map(statistics.median, taken)
        ratio = statistics.median(b / a for a, b in zip(*taken, strict=True))
        print(f"{name:>12s} {one * 1e6:12.1f} {other * 1e6:12.1f} {ratio:6.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("errors", "times"))
    parser.add_argument("--bands", type=int, default=BANDS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=())
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default each that is there")
    args = parser.parse_args(arguments)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if args.device is not None and args.device not in devices:
        parser.error("--device cuda needs a CUDA device, and PyTorch finds none")
    torch.set_num_threads(args.threads)
    if args.only != "times":
        error_table()
    if args.only != "errors":
        for device in [args.device] if args.device else devices:
            time_table(device, args.bands, args.rounds, args.cases)


if __name__ == "__main__":
    main()
