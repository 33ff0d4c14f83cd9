"""Bound how many coins can be guessed from a Gaussian-DP run; Mahloujifar, Melis and Chaudhuri 2024.

A run is ``mu``-GDP (Dong, Roth and Su, "Gaussian Differential Privacy", 2019) if neighbours are at least as hard to
distinguish as ``N(0, 1)`` and ``N(mu, 1)``. That constrains the whole trade-off curve, of which an (epsilon, delta)
pair is a single line, so the bound is much tighter.

This is algorithm 3 of arXiv:2410.22235. Let ``p_i`` be the probability of exactly ``i`` correct guesses out of ``c``.
Sum over all counts from ``i`` on:

    right_i = sum_{j >= i} j p_j / m,    wrong_i = sum_{j >= i} (c - j) p_j / m.

Flipping the coin of one guessed canary turns a right guess into a wrong guess and does not affect the other guesses. So
privacy, averaged over canaries, implies ``right_{i+1} <= F(wrong_i)`` with the concave ``F(x) = Phi(Phi^-1(x) + mu)``.
Starting from ``P[at least v correct] = s`` and counting down from v, this gives the smallest possible ``p_i``. If they
sum to more than 1, no such run reaches v with probability s.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_QUANTILE = NormalDist().inv_cdf
_MOST = 64.0
_PRECISION = 1e-5


def rejects(mu: float, *, m: int, guesses: int, correct: int, significance: float) -> bool:
    """Return whether no ``mu``-GDP run guesses so many of ``m`` coins right with probability ``significance``."""
    right = significance * correct / m
    wrong = significance * (guesses - correct) / m
    everything = guesses / m
    for count in range(correct - 1, -1, -1):
        least = _wrong_at_least(right, mu)
        if least <= wrong:
            break  # from here on neither sum changes
        right += count / (guesses - count) * (least - wrong)
        wrong = least
        if right + wrong > everything:
            return True
    return right + wrong > everything


def mu_exceeded(*, m: int, guesses: int, correct: int, significance: float, above: float) -> float:
    """Return the largest ``mu`` that ``rejects`` refuses, or the known bound ``above`` if the data shows no more."""

    def rejected(mu: float) -> bool:
        return rejects(mu, m=m, guesses=guesses, correct=correct, significance=significance)

    if not rejected(above):
        return above
    low, high = above, max(1.0, 2 * above)
    while high < _MOST and rejected(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _wrong_at_least(right: float, mu: float) -> float:
    """Return ``F^-1(right) = Phi(Phi^-1(right) - mu)``."""
    if right >= 1.0:
        return 1.0
    # NormalDist.cdf is inexact far out in the left tail; erfc is not.
    return 0.5 * math.erfc((mu - _QUANTILE(right)) / math.sqrt(2)) if right > 0.0 else 0.0
