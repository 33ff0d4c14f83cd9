"""A history of steps as what it costs: how often which mechanism was run, in no particular order.

Composition is commutative, so that equal mechanisms are counted together wherever they stand.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ._sampling import FixedSize, FullBatch, Poisson, Sampling, TruncatedPoisson

# Less than this and epsilon exceeds any use, so that infinity is as good a bound.
LEAST_NOISE = 1e-3

# Noise multiplier, sampling, steps, and the stretch of passes that they belong to.
Run = tuple[float, Sampling, int, int]


@dataclass(frozen=True)
class Mechanism:
    """A Gaussian mechanism on a random batch, in dp-accounting's numbers.

    Attributes:
        noise: Standard deviation in clip norms.
        rate: Probability of a sample to be drawn.
        relation: Which datasets are neighbours.
        group_size: Samples of one person.
        truncation: Size of the dataset and the most samples that a batch keeps.
    """

    noise: float
    rate: float
    relation: str
    group_size: int = 1
    truncation: tuple[int, int] | None = None


@dataclass(frozen=True)
class Terms:
    """All of a history that epsilon depends on.

    Attributes:
        precision: Sum of ``1 / sigma^2`` over Gaussian mechanisms without sampling, sigma in units of what
            the neighbour moves; together they are one of ``sigma = precision^-1/2``. Infinite if
            anything was released with next to no noise.
        sampled: The others and how often they were run, the one that was last used at the end.
    """

    precision: float
    sampled: tuple[tuple[Mechanism, int], ...]


def terms_of(history: Sequence[Run], *, relation: str, group_size: int) -> Terms:
    """What `history` costs a person with `group_size` samples.

    Without sampling the worst case is that all of a person's samples are in one batch: they move
    the sum `group_size` times as far. Spread over several they cost less, since Gaussian mechanisms add
    up in squares.
    """
    if any(noise < LEAST_NOISE for noise, _, _, _ in history):
        return Terms(math.inf, ())
    precision = 0.0
    counts: dict[Mechanism, int] = {}
    for (sampling, _), stretch in groupby(history, key=lambda run: (run[1], run[3])):
        runs = [(noise, steps) for noise, _, steps, _ in stretch]
        if isinstance(sampling, FixedSize):
            precision += sum(count * noise**-2 for noise, count in _once_a_pass(sampling, runs))
            continue
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
    """None without sampling."""
    # dp-accounting counts noise in clip norms, and replacing a sample moves the sum by two.
    in_clip_norms = noise * (2 if relation == "replace_one" else 1)
    match sampling:
        case Poisson(rate) if rate < 1.0:
            return Mechanism(in_clip_norms, rate, relation, group_size)
        case TruncatedPoisson(rate, num_samples, most):
            # Of the two neighbours the larger counts: the dataset and one sample more.
            larger = num_samples + (relation == "add_or_remove_one")
            return Mechanism(in_clip_norms, rate, relation, group_size, (larger, most))
        case Poisson() | FullBatch():
            return None
    raise AssertionError(f"no mechanism for {sampling!r}")


def _once_a_pass(
    sampling: FixedSize, runs: Sequence[tuple[float, int]]
) -> Iterable[tuple[float, int]]:
    """Noise of the mechanisms that the worst-placed sample takes part in, with their number.

    It is in one step of each pass, in the least noisy one at worst. If the last batch is not full
    it may be a step or left out, and a pass has ``short`` or ``long`` steps: pass j then lies somewhere within
    steps ``[j * short, (j + 1) * long)``, and all of them are looked at.
    """
    short = sampling.num_samples // sampling.batch_size
    long = -(-sampling.num_samples // sampling.batch_size)
    # Passes [first, last) that a run of steps may reach, runs sorted by `first`.
    reached: list[tuple[int, int, float]] = []
    start = 0
    for noise, steps in runs:
        reached.append((start // long, -(-(start + steps) // short), noise))
        start += steps
    # Between two neighbouring ends the same runs reach every pass.
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
