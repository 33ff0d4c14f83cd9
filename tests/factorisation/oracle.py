"""Define correlated noise slowly: with dense matrices and every set of steps that may use one sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def matrix(coefficients: Sequence[float] | Array, size: int) -> Array:
    """Return C, a banded lower-triangular Toeplitz matrix, ``[size, size]``."""
    found = np.zeros((size, size))
    for row in range(size):
        for column in range(max(0, row - len(coefficients) + 1), row + 1):
            found[row, column] = coefficients[row - column]
    return found


def separated_sets(steps: int, separation: int) -> Iterator[tuple[int, ...]]:
    """Yield all sets of steps whose distances are at least ``separation``."""
    for size in range(steps + 1):
        for chosen in itertools.combinations(range(steps), size):
            if all(later - step >= separation for step, later in itertools.pairwise(chosen)):
                yield chosen


def cyclic_sets(steps: int, bands: int) -> Iterator[tuple[int, ...]]:
    """Yield all sets of steps that may use a sample of one group, which is sampled every ``bands`` steps."""
    for group in range(bands):
        turns = range(group, steps, bands)
        for size in range(len(turns) + 1):
            yield from itertools.combinations(turns, size)


def most(strategy: Array, sets: Iterator[tuple[int, ...]]) -> float:
    """Return a bound on the change of ``C x`` over all sets of steps and rows of norm 1: ``sqrt(sum |G_ij|)``."""
    gram = np.abs(strategy.T @ strategy)
    return max(float(np.sqrt(gram[np.ix_(chosen, chosen)].sum())) for chosen in sets)
