"""Define correlated noise for long runs in shuffled passes: a Toeplitz matrix without bands, and a few buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from clipgrad.factorisation.sensitivity import separated
from clipgrad.factorisation.strategy import Strategy
from clipgrad.factorisation.toeplitz import Array

_MOST = 4


@dataclass(frozen=True)
class BufferedToeplitz:
    """The noise of a step subtracts a part of all earlier noise, from which it keeps ``buffers`` decaying sums.

    The entries of C below its diagonal are sums of ``buffers`` geometric series (McMahan, Xu and Zhang, "A Hassle-free
    Algorithm for Strong Differential Privacy in Federated Learning Systems", 2024). So a long run needs a few tensors
    of the model's size instead of one for each band. It requires a plan with ``shuffled=True``, in which each sample
    is used once in a pass. C has no bands, so no amplification by sampling is proven.

    Args:
        buffers: Number of buffers, from 1 to 4.

    Raises:
        ValueError: If ``buffers`` is not an integer from 1 to 4.
    """

    buffers: int = 2

    def __post_init__(self) -> None:
        if type(self.buffers) is not int or not 1 <= self.buffers <= _MOST:
            raise ValueError(
                f"buffers must be an integer from 1 to {_MOST}, got {self.buffers!r}; 2, for example."
            )

    def strategy(self, steps: int, separation: int) -> Strategy:
        """Return the matrix of a run in which two steps of one sample are at least ``separation`` steps apart.

        Raises:
            ImportError: If SciPy is not installed.
        """
        weights, decays = _found(self.buffers, steps, separation)
        column = column_of(np.array(weights), np.array(decays), steps)
        return Strategy(
            tuple(column.tolist()), scale_of(column, steps, separation), weights, decays
        )


def column_of(weights: Array, decays: Array, steps: int) -> Array:
    """Return the first column of C: 1, then ``sum_j weights[j] decays[j]^(i-1)`` for row i.

    Examples:
        >>> column_of(np.array([0.5]), np.array([0.5]), 4).tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    powers = decays[:, None] ** np.arange(max(0, steps - 1))
    return np.concatenate([[1.0], weights @ powers])


def scale_of(column: Array, steps: int, separation: int) -> float:
    """Return the sensitivity per pass, with which k passes cost at most as much as k Gaussian mechanisms.

    One sample moves the first k passes by at most ``separated(...)``, which grows faster than ``sqrt(k)``, since the
    columns overlap. The largest quotient over all k bounds every number of passes, so a run may end after any pass.
    """
    passes = -(-steps // separation)
    quotients = []
    for k in range(1, passes + 1):
        rows = min(k * separation, steps)
        quotients.append(separated(column[:rows], steps=rows, separation=separation) / math.sqrt(k))
    return max(quotients)


@lru_cache(maxsize=32)
def _found(
    buffers: int, steps: int, separation: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return weights and decays with a small error of prefix sums; privacy does not depend on their quality."""
    try:
        optimize: Any = import_module("scipy.optimize")
        lfilter: Any = import_module("scipy.signal").lfilter
    except ImportError as error:
        raise ImportError(
            f"scipy could not be imported ({error}), and BufferedToeplitz needs it. Run pip install scipy, or use "
            "BandedFactorisation(bands=..., coefficients='square_root')."
        ) from error
    impulse = np.eye(1, steps)[0]
    rows = np.arange(steps, 0, -1)

    def log_error(raw: Array) -> float:
        weights, decays = _from_raw(raw)
        moved = separated(column_of(weights, decays, steps), steps=steps, separation=separation)
        summed = np.cumsum(lfilter(*_inverse_of(weights, decays), impulse))
        return math.log(moved) + math.log(float(rows @ summed**2)) / 2

    best: Any = None
    for longest in (steps, separation):
        horizons = np.geomspace(2.0, max(4.0, longest / 2), buffers)[::-1]
        start = np.concatenate([np.full(buffers, -1.0), np.log(horizons)])
        result = optimize.minimize(log_error, start, method="L-BFGS-B", options={"maxiter": 100})
        if best is None or result.fun < best.fun:
            best = result
    weights, decays = _from_raw(best.x)
    return tuple(weights.tolist()), tuple(decays.tolist())


def _inverse_of(weights: Array, decays: Array) -> tuple[Array, Array]:
    """Return numerator and denominator of the power series of ``C^-1``, which is a rational function."""
    product = np.ones(1)
    for decay in decays:
        product = np.convolve(product, [1.0, -decay])
    total = product.copy()
    for index, weight in enumerate(weights):
        others = np.ones(1)
        for decay in np.delete(decays, index):
            others = np.convolve(others, [1.0, -decay])
        total[1:] += weight * others
    return product, total


def _from_raw(raw: Array) -> tuple[Array, Array]:
    """Return positive weights with a sum below 1, and decays between 0 and 1.

    The column is then positive and does not increase, which the sensitivity's proof needs. The entries of the inverse
    decay (theorem of Enestroem and Kakeya).
    """
    first, second = np.split(raw, 2)
    shares = np.exp(np.clip(first, -30.0, 30.0))
    return shares / (1.0 + shares.sum()), 1.0 / (1.0 + np.exp(-np.clip(second, -30.0, 18.0)))
