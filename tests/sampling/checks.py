"""Share exact probabilities, scripted words and statistics between the tests of the samplers.

Statistical checks allow eight standard deviations (a right sampler fails one with probability about 1e-15), or a
p-value of 1e-3 where the seed is fixed, so that a pass stays a pass.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from clipgrad.sampling._trials import Trials

WORDS = 2**64
RATES = [5e-324, 1e-300, 1e-9, 1e-6, 0.0042, 0.1, 0.3, 0.49, 0.5, 0.7, 1 - 1e-9, 1 - 2.0**-53, 1.0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scripted(*draws: list[int]) -> Callable[[int], NDArray[np.uint64]]:
    """This source returns given words, one list for each draw, which must have the requested length."""
    left = iter(draws)

    def words(count: int) -> NDArray[np.uint64]:
        values = next(left)
        assert len(values) == count
        return np.array(values, dtype=np.uint64)

    return words


# --------------------------------------------------------------------------- exact probabilities


def digit(trials: Trials, k: int, value: int) -> Fraction:
    """Return the probability that digit k of the first success in a window is ``value``."""
    one = Fraction(trials.ones[k], WORDS)
    return one if value else 1 - one


def first_is(trials: Trials, g: int) -> Fraction:
    """Return the probability that the first success of a window with a success is number g."""
    return math.prod(
        (digit(trials, k, g >> k & 1) for k in range(len(trials.ones))), start=Fraction(1)
    )


def first_is_below(trials: Trials, g: int) -> Fraction:
    """Return the same, summed over all numbers below g: they share g's digits down to one where g has 1 and they 0."""
    total, above = Fraction(0), Fraction(1)
    for k in reversed(range(len(trials.ones))):
        if g >> k & 1:
            total += above * digit(trials, k, 0)
        above *= digit(trials, k, g >> k & 1)
    return total


def conditional(trials: Trials, g: int) -> Fraction:
    """Return the probability that trial g of a window succeeds if the trials before it in the window fail."""
    empty = Fraction(trials.empty, WORDS)
    reached = (1 - empty) * (1 - first_is_below(trials, g)) + empty
    return (1 - empty) * first_is(trials, g) / reached


def outcomes(trials: Trials, size: int) -> dict[frozenset[int], Fraction]:
    """Return the probability of each set of successes, found by enumerating all outcomes window by window."""
    window = 2 ** len(trials.ones)
    empty = Fraction(trials.empty, WORDS)
    found: Counter[frozenset[int]] = Counter()

    def walk(start: int, chosen: frozenset[int], probability: Fraction) -> None:
        if start >= size:
            found[chosen] += probability  # type: ignore[assignment]
            return
        walk(start + window, chosen, probability * empty)
        for g in range(window):
            index = start + g
            more = chosen | {index} if index < size else chosen
            walk(index + 1, more, probability * (1 - empty) * first_is(trials, g))

    walk(0, frozenset(), Fraction(1))
    return dict(found)  # type: ignore[arg-type]


def poisson(chosen: Iterable[int], size: int, q: float) -> Fraction:
    """Return the required probability of a batch."""
    k = len(frozenset(chosen))
    return Fraction(q) ** k * (1 - Fraction(q)) ** (size - k)


def allowed(trials: Trials) -> Fraction:
    """Return the relative error of each trial that ``Trials`` promises."""
    return Fraction(len(trials.ones) + 1, 2**62)


# ------------------------------------------------------------------------------------ statistics


def membership(batches: list[list[int]], size: int) -> Tensor:
    """Return ``[batches, size]``, which is 1 where the index is in the batch."""
    table = torch.zeros(len(batches), size, dtype=torch.float64)
    for row, batch in zip(table, batches, strict=True):
        row[batch] = 1
    return table


def check_poisson(table: Tensor, q: float) -> None:
    """Check marginals, batch sizes, and the covariance of any two indices and of successive batches."""
    steps, size = table.shape
    variance = q * (1 - q)
    assert (table.mean(0) - q).abs().max() < 8 * math.sqrt(variance / steps)
    sizes = table.sum(1)
    assert abs(sizes.mean() - size * q) < 8 * math.sqrt(size * variance / steps)
    # Fourth central moment of a binomial, for the variance of its sample variance.
    fourth = size * variance * (1 + (3 * size - 6) * variance)
    spread = math.sqrt((fourth - (size * variance) ** 2) / steps)
    assert abs(sizes.var() - size * variance) < 8 * spread
    z = (table - q) / math.sqrt(variance)
    among = z.T @ z / steps - torch.eye(size, dtype=z.dtype)
    assert among.fill_diagonal_(0).abs().max() < 8 / math.sqrt(steps)
    assert (z[1:].T @ z[:-1] / (steps - 1)).abs().max() < 8 / math.sqrt(steps - 1)


def p_value(drawn: Iterable[Iterable[int]], probabilities: dict[frozenset[int], float]) -> float:
    """Return the p-value of a chi-square test of these probabilities; 0 if a batch has probability 0."""
    counts = Counter(map(frozenset, drawn))
    if not counts.keys() <= probabilities.keys():
        return 0.0
    total = sum(counts.values())
    expected = np.array(list(probabilities.values())) * total
    assert expected.min() > 5, "too few batches for a chi-square test"
    observed = [counts[chosen] for chosen in probabilities]
    return float(stats.chisquare(observed, expected).pvalue)


def subsets(size: int) -> Iterator[frozenset[int]]:
    for bits in range(2**size):
        yield frozenset(i for i in range(size) if bits >> i & 1)
