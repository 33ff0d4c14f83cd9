"""Compute a lower bound on epsilon from scores and coins."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipgrad.audit._approximate import epsilon_exceeded
from clipgrad.audit._coins import order_of_ties
from clipgrad.audit._gaussian import mu_exceeded
from clipgrad.audit._scipy import gaussian_epsilon, special

Curve = Literal["approximate", "gaussian"]

# Even 16 correct guesses of 16 show hardly anything if several counts are tried.
_FEWEST_GUESSES = 16
_DEEPEST = 128
_IMPOSSIBLE = 1e-9


@dataclass(frozen=True)
class AuditResult:
    """This class holds the result of an audit.

    Attributes:
        epsilon: The bound: with probability ``confidence`` the run's true epsilon at ``delta`` is at least this number.
            0.0 states nothing.
        delta: The delta of the bound.
        confidence: Probability, over coins and training, that the bound holds.
        canaries: Number of canaries.
        guesses: How many of the highest scores were guessed to be in, and how many of the lowest to be out.
        correct: Number of correct guesses.
        curve: The curve that the bound was tested against; see :func:`lower_bound`.
        mu: For ``curve="gaussian"``, the bound as ``mu`` of Gaussian DP; else None.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: tuple[int, int]
    correct: int
    curve: Curve = "approximate"
    mu: float | None = None

    def __str__(self) -> str:
        return (
            f"epsilon >= {self.epsilon:.2f} at delta = {self.delta:g}, with {100 * self.confidence:g} % confidence "
            f"({self.correct} of {sum(self.guesses)} guesses right, {self.canaries} canaries)"
        )


def lower_bound(
    scores: Any,
    included: Any,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: tuple[int, int] | None = None,
    curve: Curve = "approximate",
) -> AuditResult:
    """Return a lower bound on the epsilon of the run that the scores come from.

    Args:
        scores: ``[m]``, high for canaries that seem to have been trained on. They may be any function of the canaries
            and of what the run released, but **not of the coins** themselves.
        included: Boolean ``[m]``: the coins, :attr:`Canaries.included`. They must be fair and independent; the bound
            relies on that and on nothing else.
        delta: The delta at which epsilon is bounded; take the claim's. With ``curve="approximate"`` keep ``m * delta``
            below about 0.01, or the bound becomes useless.
        confidence: Probability with which the bound holds.
        guesses: How many of the highest scores to guess in, and how many of the lowest out, chosen **before looking**
            at the coins. By default about 15 choices that depend on ``m`` alone are tried, each at a confidence that
            pays for all of them (Bonferroni).
        curve: ``"approximate"`` assumes nothing about the run (Steinke et al. 2023). ``"gaussian"`` bounds the ``mu``
            for which the run is ``mu``-GDP and converts it to epsilon at ``delta`` (Mahloujifar et al. 2024). It is
            much tighter, and the right comparison for runs whose claim *is* Gaussian: full batches (rate 1), ``T``
            steps with ``mu = sqrt(T) / noise_multiplier``. The curve of a subsampled run is not Gaussian, and this
            epsilon may exceed its claim without a fault.

    Returns:
        The best bound, with the guesses that gave it.

    Raises:
        ValueError: If arguments are out of range, shapes differ, a score is NaN, or heads and tails are so unequal in
            number that the coins cannot be fair.
        ImportError: If scipy, or for ``"gaussian"`` dp-accounting, is not installed.

    Examples:
        >>> coins = np.arange(1000) % 2 == 0
        >>> # a run that reveals every coin, and a run that reveals nothing
        >>> print(lower_bound(coins, coins, delta=1e-5, guesses=(300, 300)))
        epsilon >= 5.27 at delta = 1e-05, with 95 % confidence (600 of 600 guesses right, 1000 canaries)
        >>> lower_bound(np.zeros(1000), coins, delta=1e-5).epsilon
        0.0
    """
    values, coins = _check_scores(scores, included)
    _check_numbers(delta, confidence, curve)
    m = len(coins)
    attempts = default_guesses(m) if guesses is None else [_check_guesses(guesses, m)]
    significance = (1.0 - confidence) / len(attempts)
    ranked = _rank_coins(values, coins)
    counted = [(pair, _count_correct(ranked, pair)) for pair in attempts]
    (pair, correct), epsilon, mu = _best_bound(counted, m, delta, significance, curve)
    return AuditResult(epsilon, delta, confidence, m, pair, correct, curve, mu)


def default_guesses(m: int) -> list[tuple[int, int]]:
    """Return the numbers of guesses to try, a function of ``m`` alone.

    They are equal numbers at both ends of the ranking, and guesses at the top alone: a canary that Poisson sampling
    happened to select can stand out, while a canary that it never selected cannot.
    """
    both: list[tuple[int, int]] = []
    top: list[tuple[int, int]] = []
    total = m
    while total >= max(_FEWEST_GUESSES, m // _DEEPEST) or not both:
        both.append((total // 2, total // 2) if total > 1 else (1, 0))
        if total < m:
            top.append((total, 0))
        total //= 2
    return both + top


def _best_bound(
    counted: Sequence[tuple[tuple[int, int], int]],
    m: int,
    delta: float,
    significance: float,
    curve: Curve,
) -> tuple[tuple[tuple[int, int], int], float, float | None]:
    best, found = counted[0], 0.0
    for pair, correct in counted:
        if correct == 0:
            continue
        seen = {"m": m, "guesses": sum(pair), "correct": correct}
        if curve == "gaussian":
            bound = mu_exceeded(**seen, significance=significance, above=found)
        else:
            bound = epsilon_exceeded(**seen, delta=delta, significance=significance, above=found)
        if bound > found:
            best, found = (pair, correct), bound
    if curve == "gaussian":
        return best, gaussian_epsilon(found, delta), found
    return best, found, None


def _rank_coins(values: NDArray[Any], coins: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the coins by falling score; the order of equal scores is independent of the coins."""
    shuffled = order_of_ties(len(coins))
    order = shuffled[np.argsort(-values[shuffled], kind="stable")]
    return coins[order]


def _count_correct(ranked: NDArray[np.bool_], pair: tuple[int, int]) -> int:
    top, bottom = pair
    return int(ranked[:top].sum()) + int((~ranked[len(ranked) - bottom :]).sum())


def _check_scores(scores: Any, included: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values, coins = _array(scores).astype(np.float64), _array(included)
    if coins.dtype != np.bool_ or coins.ndim != 1 or not len(coins):
        raise ValueError(
            f"included must be boolean of shape [m], got {coins.dtype} of shape {coins.shape}; it is Canaries.included."
        )
    if values.shape != coins.shape:
        raise ValueError(
            f"scores must have one value per canary, shape {coins.shape}, got {values.shape}."
        )
    if np.isnan(values).any():
        raise ValueError(
            f"scores holds {int(np.isnan(values).sum())} NaN, which has no rank; decide what a canary without a score "
            "gets, a low one for example, without looking at its coin."
        )
    heads = int(coins.sum())
    fewer = min(heads, len(coins) - heads)
    if 2 * float(special().bdtr(fewer, len(coins), 0.5)) < _IMPOSSIBLE:
        raise ValueError(
            f"included has {heads} of {len(coins)} canaries in, which fair coins do not produce, and the bound holds "
            "for fair coins only. Draw them with Canaries.draw, and pass all canaries, those left out too."
        )
    return values, coins


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _check_numbers(delta: Any, confidence: Any, curve: str) -> None:
    for name, value in (("delta", delta), ("confidence", confidence)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, got {value!r}.")
    if curve not in ("approximate", "gaussian"):
        raise ValueError(f"curve must be 'approximate' or 'gaussian', got {curve!r}.")
    if not 0.0 <= delta < 1.0 or (curve == "gaussian" and delta == 0.0):
        raise ValueError(
            f"delta must be at least 0 and below 1, and positive for curve='gaussian', got {delta}."
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(
            f"confidence must lie between 0 and 1, got {confidence}; 0.95, for example."
        )


def _check_guesses(guesses: Any, m: int) -> tuple[int, int]:
    fits = len(guesses) == 2 and all(type(count) is int and count >= 0 for count in guesses)
    if not fits or not 1 <= sum(guesses) <= m:
        raise ValueError(
            f"guesses must be two counts, in and out, that sum to 1 to {m} (the canaries), got {guesses!r}."
        )
    return guesses[0], guesses[1]
