"""Find the banded coefficients whose prefix sums have the least error, with SciPy."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from clipgrad.factorisation.toeplitz import Array, inverse, square_root

_TOO_LARGE = 1e100


def optimised(bands: int, steps: int) -> Array:
    """Return the banded coefficients with the least ``prefix_sum_error`` over ``steps`` steps.

    The search starts at the square root and follows the exact gradient (L-BFGS). The result is never worse than the
    start. Privacy does not depend on the result's quality: noise and accounting use the same coefficients.

    Args:
        bands: Number of coefficients, at least 1.
        steps: Number of steps of the run.

    Raises:
        ImportError: If SciPy is not installed.
    """
    return np.array(_found(bands, steps))


@lru_cache(maxsize=64)
def _found(bands: int, steps: int) -> tuple[float, ...]:
    if bands == 1:
        return (1.0,)
    try:
        optimize: Any = import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError(
            f"scipy.optimize could not be imported ({error}), and optimised coefficients need it. "
            "Run pip install scipy, or use coefficients='square_root'."
        ) from error
    start = square_root(bands)
    result = optimize.minimize(
        _log_error, start[1:], args=(steps,), jac=True, method="L-BFGS-B", options={"maxiter": 500}
    )
    found = np.concatenate([[1.0], result.x])
    better = _log_error(found[1:], steps)[0] < _log_error(start[1:], steps)[0]
    return tuple(found.tolist() if better and is_stable(found) else start.tolist())


def _log_error(tail: Array, steps: int) -> tuple[float, Array]:
    """Return twice the logarithm of the error, up to a constant, and its gradient.

    With ``s = 1 / ((1 - x) c)`` the squared error is ``|c|^2 sum_t (steps - t) s_t^2``, and ``ds/dc_i = -x^i s / c``.
    """
    coefficients = np.concatenate([[1.0], tail])
    # The search may try coefficients whose inverse grows without bound; it then tries a shorter step.
    with np.errstate(over="ignore", invalid="ignore"):
        inverted = inverse(coefficients, steps)
        summed = np.cumsum(inverted)
        weighted = np.arange(steps, 0, -1) * summed
        value, square = float(weighted @ summed), float(coefficients @ coefficients)
    if not value < _TOO_LARGE:
        return _TOO_LARGE, np.zeros_like(tail)
    by_both = np.convolve(summed, inverted)[:steps]
    lags = range(1, len(coefficients))
    slope = [-2.0 * float(weighted[i:] @ by_both[: steps - i]) if i < steps else 0.0 for i in lags]
    return float(np.log(value) + np.log(square)), np.array(slope) / value + 2.0 * tail / square


def is_stable(coefficients: Array) -> bool:
    """Return whether the coefficients of the inverse decay, so that rounding errors in past noise decay too."""
    if len(coefficients) == 1:
        return True
    # np.roots reads 1 + c_1 x + ... as a polynomial in 1 / x, so all roots must lie inside the unit circle.
    return bool(np.abs(np.roots(coefficients)).max() < 1.0)
