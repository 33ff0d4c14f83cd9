"""Sample the discrete Gaussian exactly, many values at a time, by integer arithmetic on the operating system's bits.

Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy" (arXiv:2004.00010), algorithms 1 to
3, for a parameter ``sigma`` that is an integer S. Their ``t`` is S as well here. Any t is correct; the choice only
changes how often a candidate is rejected. All fractions then have the denominators S and ``2 S^2``, and arithmetic fits
64 bits. Larger candidates, at most one in 8000, are handled by Python's integers.

An established library, OpenDP, samples any rational sigma; it took about ten times as long.
"""

from __future__ import annotations

import secrets
from fractions import Fraction
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

MOST_SIGMA = 2**28
_WORD_BITS = 62
# A distance | |candidate| - S | below this has a square of less than 63 bits.
_MOST_DISTANCE = 2**31
_AT_ONCE = 2**16  # values; they fit a cache, and the last few rejections among them cost little


def discrete_gaussian(count: int, sigma: int) -> Integers:
    """Return independent integers z with a probability proportional to ``exp(-z^2 / (2 sigma^2))``.

    ``sigma`` is from 1 to 2**28; the standard deviation is smaller by at most one part in a million.
    """
    if not 1 <= sigma <= MOST_SIGMA:
        raise ValueError(f"sigma must be from 1 to 2**28, got {sigma}; choose another grid.")
    out = np.empty(count, np.int64)
    for start in range(0, count, _AT_ONCE):
        piece = out[start : start + _AT_ONCE]
        waiting = np.arange(len(piece))
        while len(waiting):  # algorithm 3
            candidates = _laplace(len(waiting), sigma)
            accepted = _accept(np.abs(candidates) - sigma, sigma)
            piece[waiting[accepted]] = candidates[accepted]
            waiting = waiting[~accepted]
    return out


def _accept(distance: Integers, sigma: int) -> Flags:
    """Sample Bernoulli(exp(-distance^2 / (2 sigma^2)))."""
    denominator = 2 * sigma**2
    far = np.abs(distance) >= _MOST_DISTANCE
    squared = np.where(far, 0, distance) ** 2
    accepted = _bernoulli_exp(squared % denominator, denominator)
    wholes = squared // denominator
    while len(left := np.flatnonzero(accepted & (wholes > 0))):
        accepted[left] = _bernoulli_exp_of_minus_1(len(left))
        wholes[left] -= 1
    for index in np.flatnonzero(far):
        accepted[index] = _bernoulli_exp_exact(Fraction(int(distance[index]) ** 2, denominator))
    return accepted


def _laplace(count: int, scale: int) -> Integers:
    """Return independent integers z with a probability proportional to ``exp(-|z| / scale)``: algorithm 2."""
    out = np.empty(count, np.int64)
    waiting = np.arange(count)
    while len(waiting):
        rest = _uniform_below(scale, len(waiting))
        kept = _bernoulli_exp(rest, scale)
        waiting_kept, rest = waiting[kept], rest[kept]
        size = rest + scale * _geometric(len(rest))
        negative = _uniform_below(2, len(rest)) == 1
        once = ~(negative & (size == 0))  # zero has no sign, and must not count twice
        out[waiting_kept[once]] = np.where(negative, -size, size)[once]
        waiting = np.concatenate([waiting[~kept], waiting_kept[~once]])
    return out


def _geometric(count: int) -> Integers:
    """Count how often Bernoulli(exp(-1)) is true before it is false."""
    out = np.zeros(count, np.int64)
    going = np.arange(count)
    while len(going := going[_bernoulli_exp_of_minus_1(len(going))]):
        out[going] += 1
    return out


def _bernoulli_exp(numerators: Integers, denominator: int) -> Flags:
    """Sample Bernoulli(exp(-numerator / denominator)) for fractions from 0 to 1: algorithm 1.

    The algorithm's Bernoulli(x / k) is the conjunction of Bernoulli(x) and Bernoulli(1 / k).
    """
    odd = np.zeros(len(numerators), np.bool_)
    going, k = np.arange(len(numerators)), 1
    while len(going):
        odd[going] = k % 2 == 1  # final for the elements that stop in this round
        going = going[_uniform_below(denominator, len(going)) < numerators[going]]
        going = going[_uniform_below(k, len(going)) == 0]
        k += 1
    return odd


def _bernoulli_exp_of_minus_1(count: int) -> Flags:
    return _bernoulli_exp(np.ones(count, np.int64), 1)


def _uniform_below(bound: int, count: int) -> Integers:
    """Return independent integers, uniform in ``range(bound)``."""
    if bound == 1:
        return np.zeros(count, np.int64)
    # Words beyond the limit would make the smallest remainders more likely.
    limit = 2**_WORD_BITS - 2**_WORD_BITS % bound
    words = _words(count)
    while len(again := np.flatnonzero(words >= limit)):
        words[again] = _words(len(again))
    words %= bound
    return words


def _words(count: int) -> Integers:
    raw = np.frombuffer(secrets.token_bytes(8 * count), np.uint64) >> np.uint64(64 - _WORD_BITS)
    return raw.view(np.int64)


def _bernoulli_exp_exact(x: Fraction) -> bool:
    """Sample Bernoulli(exp(-x)) for any ``x >= 0``, a single value, in Python's integers."""
    while x > 1:
        if not _bernoulli_exp_exact(Fraction(1)):
            return False
        x -= 1
    k = 1
    while secrets.randbelow(x.denominator * k) < x.numerator:
        k += 1
    return k % 2 == 1
