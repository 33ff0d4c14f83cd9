"""Compute with lower-triangular Toeplitz matrices, given by their first columns, in NumPy float64.

Such matrices multiply as power series do. The matrix of prefix sums is the series ``1 / (1 - x)``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def square_root(bands: int) -> Array:
    """Return the first ``bands`` coefficients of ``(1 - x)^(-1/2)``, the square root of the matrix of prefix sums.

    They are ``binomial(2i, i) / 4^i`` (Fichtenberger, Henzinger and Upadhyay, "Constant matters", 2022). Cut to bands
    they are the banded square root of Kalinin and Lampert, "Banded Square Root Matrix Factorization for Differentially
    Private Model Training", 2024.

    Examples:
        >>> square_root(4).tolist()
        [1.0, 0.5, 0.375, 0.3125]
    """
    index = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * index - 1) / (2 * index)]))


def inverse(coefficients: Array, size: int) -> Array:
    """Return the first ``size`` coefficients of the inverse of a series that begins with 1.

    Examples:
        >>> inverse(np.array([1.0, 0.5]), 4).tolist()
        [1.0, -0.5, 0.25, -0.125]
    """
    found = np.zeros(size)
    found[0] = 1.0
    reversed_tail = coefficients[:0:-1]
    for row in range(1, size):
        reach = min(row, len(reversed_tail))
        found[row] = -reversed_tail[len(reversed_tail) - reach :] @ found[row - reach : row]
    return found


def column_norm(coefficients: Array) -> float:
    """Return the largest norm of a column, which is the first column's, since the last row cuts later columns."""
    return math.sqrt(math.fsum(coefficients**2))


def prefix_sum_error(coefficients: Array, steps: int) -> float:
    """Return the root mean square error of all prefix sums, for noise of standard deviation ``column_norm``.

    Step t releases ``x_t`` with row t of ``C^-1 Z``, so the prefix sums have the noise ``A C^-1 Z``, where A is the
    matrix of prefix sums. The error is the Frobenius norm of ``A C^-1`` over ``sqrt(steps)``, times that deviation.

    Examples:
        Independent noise has variance t in the sum of t steps:

        >>> prefix_sum_error(np.ones(1), 3) == math.sqrt((1 + 2 + 3) / 3)
        True
    """
    return column_norm(coefficients) * prefix_sum_norm(coefficients, steps)


def prefix_sum_norm(coefficients: Array, steps: int) -> float:
    """Return the Frobenius norm of ``A C^-1`` over ``sqrt(steps)``, where A is the matrix of prefix sums."""
    summed = np.cumsum(inverse(coefficients, steps))
    rows = np.arange(steps, 0, -1)
    return math.sqrt(float(rows @ summed**2) / steps)
