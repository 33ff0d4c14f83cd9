"""Reduce a history of steps to its cost: how often each mechanism ran, in no particular order.

Composition is commutative, so equal mechanisms are counted together wherever they occur in the history.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ._sampling import CyclicPoisson, FixedSize, FullBatch, Poisson, Sampling, TruncatedPoisson

# With less noise epsilon is too large to be useful, so infinity is as good a bound.
LEAST_NOISE = 1e-3

# A run consists of noise multiplier, sampling, steps, and the segment of passes or rounds that the steps belong to.
Run = tuple[float, Sampling, int, int]


@dataclass(frozen=True)
class Mechanism:
    """This class describes a Gaussian mechanism on a random batch, in dp-accounting's numbers."""

    noise: float  # Standard deviation in clip norms
    rate: float  # Probability of a sample to be in the batch
    relation: str  # Which datasets are neighbours
    group_size: int = 1  # Number of samples of one person
    # Size of the dataset and the largest number of samples in a batch; None if batches are not cut
    truncation: tuple[int, int] | None = None


@dataclass(frozen=True)
class Terms:
    """This class holds everything in a history that epsilon depends on."""

    # Sum of ``1 / sigma^2`` over Gaussian mechanisms without sampling, sigma in units of the neighbour's change.
    # Together they are one mechanism of ``sigma = precision^-1/2``. Infinite if anything was released almost
    # without noise.
    precision: float
    # The other mechanisms and how often each ran; the most recently used mechanism is the last
    sampled: tuple[tuple[Mechanism, int], ...]


def terms_of(history: Sequence[Run], *, relation: str, group_size: int) -> Terms:
    """Return what ``history`` costs a person with ``group_size`` samples.

    Without sampling the worst case is that all of a person's samples are in one batch: they move the sum ``group_size``
    times as far. In several batches they would cost less, since Gaussian mechanisms add up in squares.
    """
    if any(noise < LEAST_NOISE for noise, _, _, _ in history):
        return Terms(math.inf, ())
    precision = 0.0
    counts: dict[Mechanism, int] = {}
    for (sampling, _), segment in groupby(history, key=lambda run: (run[1], run[3])):
        runs = [(noise, steps) for noise, _, steps, _ in segment]
        if isinstance(sampling, FixedSize):
            precision += sum(
                count * noise**-2 for noise, count in _worst_step_of_each_pass(sampling, runs)
            )
            continue
        if isinstance(sampling, CyclicPoisson):
            # A block of steps may have rows of different noise; the least of it bounds every block.
            runs = [(min(noise for noise, _ in runs), sampling.rounds(sum(n for _, n in runs)))]
        for noise, steps in runs:
            mechanism = _mechanism(sampling, noise, relation, group_size)
            if mechanism is None:
                precision += steps * noise**-2
            else:
                counts[mechanism] = counts.pop(mechanism, 0) + steps
    return Terms(precision * group_size**2, tuple(counts.items()))


def _mechanism(
    sampling: Sampling, noise: float, relation: str, group_size: int
) -> Mechanism | None:
    """Return the mechanism of a step, or None without sampling."""
    # dp-accounting counts noise in clip norms, and replacing a sample moves the sum by two.
    in_clip_norms = noise * (2 if relation == "replace_one" else 1)
    match sampling:
        case Poisson(rate) | CyclicPoisson(rate) if rate < 1.0:
            return Mechanism(in_clip_norms, rate, relation, group_size)
        case TruncatedPoisson(rate, num_samples, most):
            # The larger neighbour counts; under add-or-remove it has one sample more than the dataset.
            larger = num_samples + (relation == "add_or_remove_one")
            return Mechanism(in_clip_norms, rate, relation, group_size, (larger, most))
        case Poisson() | CyclicPoisson() | FullBatch():
            return None
    raise AssertionError(f"no mechanism for {sampling!r}")


def _worst_step_of_each_pass(
    sampling: FixedSize, runs: Sequence[tuple[float, int]]
) -> Iterable[tuple[float, int]]:
    """Yield the noise of the mechanisms that the worst-placed sample takes part in, with their number.

    The sample is in one step of each pass, in the worst case in the least noisy step. If the last batch is not full, it
    may be a step or be omitted, so a pass has ``short`` or ``long`` steps. Pass j then lies somewhere within steps
    ``[j * short, (j + 1) * long)``, so the least noisy of all these steps counts.
    """
    short = sampling.num_samples // sampling.batch_size
    long = -(-sampling.num_samples // sampling.batch_size)
    # Passes [first, last) that may overlap a run of steps, with its noise; sorted by `first`.
    reached: list[tuple[int, int, float]] = []
    start = 0
    for noise, steps in runs:
        reached.append((start // long, -(-(start + steps) // short), noise))
        start += steps
    # All passes between two consecutive ends may overlap the same runs.
    ends = sorted({end for first, last, _ in reached for end in (first, last)})
    waiting: list[tuple[float, int]] = []
    following = 0
    for first, last in pairwise(ends):
        while following < len(reached) and reached[following][0] <= first:
            _, until, noise = reached[following]
            heapq.heappush(waiting, (noise, until))
            following += 1
        while waiting[0][1] <= first:
            heapq.heappop(waiting)
        yield waiting[0][0], last - first
