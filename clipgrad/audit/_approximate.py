"""Bound how many coins can be guessed from an (epsilon, delta)-DP run; Steinke, Nasr and Jagielski 2023.

This is the main theorem of arXiv:2305.08846 (their code is appendix D). Let ``m`` fair coins decide what an (epsilon,
delta)-DP run sees, and let ``r`` of them be guessed from what it releases, where ``r`` is fixed beforehand. With
``W ~ Binomial(r, 1 / (1 + exp(-epsilon)))``,

    P[at least v correct] <= P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i,    i = 1, 2, ...
"""

from __future__ import annotations

import math

import numpy as np

from clipgrad.audit._scipy import special

_GRID = 64
_BISECTIONS = 30


def p_value(epsilon: float, *, delta: float, m: int, guesses: int, correct: int) -> float:
    """Bound the probability of so many ``correct`` of ``guesses`` guesses at ``m`` coins, if the claim holds."""
    if correct == 0:
        return 1.0
    q = 1.0 / (1.0 + math.exp(-epsilon))
    at_least = np.arange(correct, 0, -1)
    # P[W >= k] for k = correct, ..., 1, 0
    tails = np.append(special().betainc(at_least, guesses - at_least + 1, q), 1.0)
    steepest = np.max((tails[1:] - tails[0]) / np.arange(1, correct + 1))
    return min(1.0, float(tails[0] + 2 * m * delta * steepest))


def epsilon_exceeded(
    *, delta: float, m: int, guesses: int, correct: int, significance: float, above: float = 0.0
) -> float:
    """Return the largest epsilon such that all values up to it have a p-value of at most ``significance``.

    The arguments are those of ``p_value``. ``significance`` is one minus the confidence. ``above`` is a bound that is
    known already, and is returned if the data shows no more.
    """
    if correct == 0:
        return above
    # At delta = 0 this is Clopper and Pearson's lower bound on the accuracy; a larger delta only lowers the bound.
    q = float(special().betaincinv(correct, guesses - correct + 1, significance))
    most = math.log(q) - math.log1p(-q)
    if most <= above or delta == 0.0:
        return max(above, most)

    def rejected(epsilon: float) -> bool:
        value = p_value(epsilon, delta=delta, m=m, guesses=guesses, correct=correct)
        return value <= significance

    if not rejected(above):
        return above
    # The second term need not grow with epsilon, and the true epsilon may be the first that is not rejected. So the
    # search for the first one goes upwards.
    low = 0.0
    for high in np.linspace(0.0, most, _GRID + 1).tolist():
        if not rejected(high):
            break
        low = high
    else:
        return most
    for _ in range(_BISECTIONS if high > 0.0 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return max(above, float(low))
