"""How many coins a Gaussian-DP run lets be guessed; Mahloujifar, Melis and Chaudhuri 2024.

A run is ``mu``-GDP (Dong, Roth and Su, "Gaussian Differential Privacy", 2019) if telling neighbours
apart is no easier than telling ``N(0, 1)`` from ``N(mu, 1)``. That constrains the whole trade-off
curve, of which an (epsilon, delta) pair is one line, and so the bound is much tighter.

Algorithm 3 of arXiv:2410.22235. Let ``p_i`` be the probability of exactly ``i`` correct guesses out
of ``c``, and, summed over all counts from ``i`` on,

    right_i = sum_{j >= i} j p_j / m,    wrong_i = sum_{j >= i} (c - j) p_j / m.

Flipping the coin of one guessed canary turns a right guess into a wrong one and leaves the other
guesses alone, so that privacy, averaged over canaries, says ``right_{i+1} <= F(wrong_i)`` with the
concave ``F(x) = Phi(Phi^-1(x) + mu)``. From ``P[at least v correct] = s`` follow, downwards from v, the
smallest ``p_i`` that this allows; if they sum to more than 1, no such run reaches v with probability s.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_QUANTILE = NormalDist().inv_cdf
_MOST = 64.0
_PRECISION = 1e-5


def rejects(mu: float, *, m: int, guesses: int, correct: int, significance: float) -> bool:
    """Whether no ``mu``-GDP run has so many correct guesses or more with probability ``significance``.

    Args:
        mu: The claim, at least 0.
        m: Number of canaries.
        guesses: How many coins are guessed, at most ``m``.
        correct: How many of the guesses are right.
        significance: One minus the confidence.
    """
    right = significance * correct / m
    wrong = significance * (guesses - correct) / m
    everything = guesses / m
    for count in range(correct - 1, -1, -1):
        least = _wrong_at_least(right, mu)
        if least <= wrong:
            break  # then neither changes any more
        right += count / (guesses - count) * (least - wrong)
        wrong = least
        if right + wrong > everything:
            return True
    return right + wrong > everything


def mu_exceeded(*, m: int, guesses: int, correct: int, significance: float, above: float) -> float:
    """The largest ``mu`` that is rejected.

    Args:
        m: Number of canaries.
        guesses: How many coins are guessed.
        correct: How many of the guesses are right.
        significance: One minus the confidence.
        above: What is known already; nothing smaller is looked for.

    Returns:
        At least ``above``, which means that no more was shown.
    """

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
    """``F^-1(right) = Phi(Phi^-1(right) - mu)``."""
    if right >= 1.0:
        return 1.0
    # erfc, as NormalDist.cdf is inexact far out on the left
    return 0.5 * math.erfc((mu - _QUANTILE(right)) / math.sqrt(2)) if right > 0.0 else 0.0
