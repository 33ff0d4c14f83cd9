"""Simulated audits of mechanisms whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from clipgrad.audit import lower_bound
from clipgrad.audit._gaussian import rejects
from tests.audit_tools import gaussian_scores, violations_allowed
from tests.nightly import pairs


def randomized_response(
    coins: np.ndarray[Any, Any], epsilon: float, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    honest = generator.random(len(coins)) < 1 / (1 + math.exp(-epsilon))
    return np.where(honest, coins, ~coins).astype(float)


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_randomized_response_is_not_overestimated_and_nearly_met(epsilon: float) -> None:
    generator, trials, m = np.random.default_rng(1), 400, 200
    found = []
    for _ in range(trials):
        coins = generator.random(m) < 0.5
        scores = randomized_response(coins, epsilon, generator)
        # Every score is a guess: of the ones in, of the zeros out.
        pair = (int(scores.sum()), m - int(scores.sum()))
        found.append(lower_bound(scores, coins, delta=0.0, guesses=pair).epsilon)
    violated = int((np.array(found) > epsilon).sum())
    assert violated <= violations_allowed(trials, 0.05)
    assert violated >= 2  # 2.5 % to 5 % are exceeded: the bound gives nothing away
    assert epsilon < 1 or np.median(found) > 0.5 * epsilon


@pytest.mark.parametrize(
    ("curve", "guesses", "mu"),
    pairs(["approximate", "gaussian"], [None, (30, 30), (40, 0)], [0.3, 1.5]),
)
def test_the_gaussian_mechanism_is_not_overestimated(
    curve: Any, guesses: tuple[int, int] | None, mu: float
) -> None:
    generator, trials, m, delta = np.random.default_rng(2), 100, 400, 1e-5
    truth = gaussian_epsilon(mu, delta)
    found = []
    for _ in range(trials):
        coins = generator.random(m) < 0.5
        scores = gaussian_scores(coins, mu, generator)
        found.append(lower_bound(scores, coins, delta=delta, guesses=guesses, curve=curve).epsilon)
    assert (np.array(found) > truth).sum() <= violations_allowed(trials, 0.05)
    assert (np.array(found) > 1.5 * truth).sum() == 0
    if curve == "gaussian" and mu == 1.5:
        assert np.median(found) > 0.3 * truth


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Dong, Roth and Su 2019, corollary 2.13, solved by bisection."""

    def delta_of(epsilon: float) -> float:
        upper = stats.norm.cdf(-epsilon / mu + mu / 2)
        return float(upper - math.exp(epsilon) * stats.norm.cdf(-epsilon / mu - mu / 2))

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return low


def test_a_mechanism_that_tells_a_few_is_covered_by_its_delta() -> None:
    # (0, delta)-DP: with probability delta a canary's coin is published, else nothing is.
    generator, trials, m, delta = np.random.default_rng(3), 200, 500, 0.02
    with_delta = without = 0
    for _ in range(trials):
        coins = generator.random(m) < 0.5
        told = generator.random(m) < delta
        scores = generator.standard_normal(m) + np.where(told, 100.0 * (coins - 0.5), 0.0)
        with_delta += lower_bound(scores, coins, delta=delta, guesses=(4, 4)).epsilon > 0
        without += lower_bound(scores, coins, delta=0.0, guesses=(4, 4)).epsilon > 0
    assert with_delta <= violations_allowed(trials, 0.05)
    assert without > trials / 2  # so the term with delta is what holds


def test_a_gaussian_curve_is_rejected_only_as_often_as_promised() -> None:
    generator, trials, m, mu = np.random.default_rng(4), 2000, 300, 1.0
    rejected = 0
    for _ in range(trials):
        coins = generator.random(m) < 0.5
        top = np.argsort(-gaussian_scores(coins, mu, generator))[:30]
        correct = int(coins[top].sum())
        rejected += rejects(mu, m=m, guesses=30, correct=correct, significance=0.05)
    assert rejected <= violations_allowed(trials, 0.05)


def most_likely(mu: float, m: int, guesses: int, correct: int) -> float:
    """The largest P[at least ``correct`` right] that the algorithm's constraints allow, as a linear program.

    The variables are the probabilities of each count; the convex curve is the maximum of its tangents.
    """
    counts = np.arange(guesses + 1)
    right, wrong = counts / m, (guesses - counts) / m
    points = stats.norm.cdf(np.linspace(-7, 4, 300))
    quantiles = stats.norm.ppf(points)
    values = stats.norm.cdf(quantiles - mu)  # the curve at the points, and its slopes there
    slopes = stats.norm.pdf(quantiles - mu) / stats.norm.pdf(quantiles)
    rows, limits = [], []
    for i in range(1, guesses + 1):
        for point, value, slope in zip(points, values, slopes, strict=True):
            # value + slope * (sum of right from i on - point) <= sum of wrong from i - 1 on
            rows.append(slope * right * (counts >= i) - wrong * (counts >= i - 1))
            limits.append(slope * point - value)
    found = optimize.linprog(
        -(counts >= correct).astype(float),
        A_ub=np.array(rows),
        b_ub=limits,
        A_eq=np.ones((1, guesses + 1)),
        b_eq=[1.0],
    )
    assert found.status == 0
    return -float(found.fun)


@pytest.mark.parametrize(
    ("mu", "m", "guesses", "correct"), [(0.5, 20, 8, 7), (1.5, 8, 8, 6), (1.0, 30, 10, 10)]
)
def test_a_gaussian_curve_is_rejected_where_its_constraints_end(
    mu: float, m: int, guesses: int, correct: int
) -> None:
    most = most_likely(mu, m, guesses, correct)
    case: dict[str, Any] = {"mu": mu, "m": m, "guesses": guesses, "correct": correct}
    assert not rejects(significance=most * 0.99, **case)
    assert rejects(significance=most * 1.01, **case)


def test_a_gaussian_curve_at_its_worst() -> None:
    # One canary that is told all of: 'm = 1' is an ordinary hypothesis test with a fair prior.
    mu = 1.0
    accuracy = float(stats.norm.cdf(mu / 2))
    case: dict[str, int] = {"m": 1, "guesses": 1, "correct": 1}
    assert not rejects(mu, significance=accuracy - 1e-9, **case)
    assert rejects(mu, significance=accuracy + 1e-9, **case)
