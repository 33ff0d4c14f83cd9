"""Bound how far one sample moves ``C x``, for the participation patterns with a proven bound.

Row t of ``x`` is the clipped sum of step t. A sample that is used in the steps S moves ``C x`` by the columns S of C,
each times a row of norm at most 1.
"""

from __future__ import annotations

import math

import numpy as np

from clipgrad.factorisation.toeplitz import Array


def separated(coefficients: Array, *, steps: int, separation: int) -> float:
    """Return the sensitivity if any two steps of a sample are at least ``separation`` steps apart.

    If ``separation`` is at least the number of bands, the columns of a sample have no row in common. They are
    orthogonal, so their squared norms add up for coefficients of any sign. Otherwise the coefficients must be
    nonnegative and nonincreasing. The worst steps are then ``0, s, 2s, ...`` with equal rows (Kalinin and Lampert 2024,
    "Banded Square Root Matrix Factorization for Differentially Private Model Training", theorem 2).

    Args:
        coefficients: First column of C.
        steps: Number of steps of the run.
        separation: Least distance between two steps of one sample.

    Raises:
        ValueError: If no bound is proven.
    """
    taken = range(0, steps, separation)
    if separation >= len(coefficients):
        first = coefficients[:steps]
        # The end of the run can cut the last column; a whole column bounds its norm.
        return math.sqrt(len(taken) * math.fsum(first**2))
    if (coefficients < 0).any() or (np.diff(coefficients) > 0).any():
        raise ValueError(
            f"coefficients must be at least 0 and must not increase if samples are used every {separation} steps, "
            f"which is less than {len(coefficients)} bands: no sensitivity is proven. Use at most {separation} bands."
        )
    column = np.zeros(steps)
    for start in taken:
        reach = min(len(coefficients), steps - start)
        column[start : start + reach] += coefficients[:reach]
    return math.sqrt(math.fsum(column**2))
