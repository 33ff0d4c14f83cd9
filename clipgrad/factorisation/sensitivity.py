"""Bound how far one sample moves ``C x``, for the ways of taking part for which a bound is proven.

Row t of ``x`` is the clipped sum of step t. A sample that takes part in the steps S moves ``C x`` by the columns S of
C, each times a row of norm 1 at most.
"""

from __future__ import annotations

import math

import numpy as np

from clipgrad.factorisation.toeplitz import Array


def separated(coefficients: Array, *, steps: int, separation: int) -> float:
    """Return the sensitivity if any two steps of a sample are at least ``separation`` apart.

    If ``separation`` is at least the number of bands, the columns of a sample have no row in common. They are
    orthogonal, and their squares add up, whatever the signs of coefficients. Else the coefficients must not be
    negative and not increase. Then the worst steps are ``0, s, 2s, ...`` with equal rows (Kalinin and Lampert 2024,
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
        # Only the last column can be cut by the end of the run. Whole columns bound it.
        return math.sqrt(len(taken) * math.fsum(first**2))
    if (coefficients < 0).any() or (np.diff(coefficients) > 0).any():
        raise ValueError(
            f"coefficients must be at least 0 and must not increase if samples take part every {separation} steps, "
            f"which is less than {len(coefficients)} bands: no sensitivity is proven. Use at most {separation} bands."
        )
    column = np.zeros(steps)
    for start in taken:
        reach = min(len(coefficients), steps - start)
        column[start : start + reach] += coefficients[:reach]
    return math.sqrt(math.fsum(column**2))
