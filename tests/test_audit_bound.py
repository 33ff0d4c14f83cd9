"""The mathematics of an audit: formulas, other people's code, and simulated audits of known mechanisms."""

from __future__ import annotations

import json
import math
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from clipgrad.audit import Canaries, coin_flips, lower_bound
from clipgrad.audit._approximate import epsilon_exceeded, p_value
from clipgrad.audit._bound import default_guesses
from clipgrad.audit._gaussian import mu_exceeded, rejects
from tests.audit_tools import gaussian_scores, violations_allowed

JAX = Path(__file__).parents[1] / ".venv-jax" / "bin" / "python"
COUNTS = [(100, 100, 75), (1000, 200, 190), (1000, 200, 200), (50, 1, 1), (400, 400, 0), (9, 7, 3)]


def slow_p_value(epsilon: float, delta: float, m: int, guesses: int, correct: int) -> float:
    """The theorem's formula, term by term."""
    pmf = stats.binom(guesses, 1 / (1 + math.exp(-epsilon))).pmf(np.arange(guesses + 1)).tolist()
    steepest = max(sum(pmf[max(0, correct - i) : correct]) / i for i in range(1, m + 1))
    return min(1.0, sum(pmf[correct:]) + 2 * m * delta * steepest)


@pytest.mark.parametrize(("m", "guesses", "correct"), COUNTS)
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_p_value_is_the_formula(m: int, guesses: int, correct: int, delta: float) -> None:
    for epsilon in (0.0, 0.7, 3.0):
        expected = slow_p_value(epsilon, delta, m, guesses, correct)
        found = p_value(epsilon, delta=delta, m=m, guesses=guesses, correct=correct)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("guesses", "correct"), [(100, 75), (600, 600), (17, 16), (200, 120)])
def test_without_delta_it_is_the_binomial_in_exact_arithmetic(guesses: int, correct: int) -> None:
    found = epsilon_exceeded(delta=0.0, m=1000, guesses=guesses, correct=correct, significance=0.05)

    def tail(epsilon: float) -> Fraction:  # P[Binomial(guesses, q) >= correct], q as a fraction
        q = Fraction(1 / (1 + math.exp(-epsilon)))
        return sum(
            (
                math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k)
                for k in range(correct, guesses + 1)
            ),
            Fraction(0),
        )

    assert tail(found - 1e-6) < Fraction(5, 100) < tail(found + 1e-6)


def test_all_right_has_a_closed_form() -> None:
    # q^r = 5 %
    q = 0.05 ** (1 / 600)
    found = epsilon_exceeded(delta=0.0, m=1000, guesses=600, correct=600, significance=0.05)
    assert found == pytest.approx(math.log(q / (1 - q)))


@pytest.mark.parametrize("delta", [1e-6, 1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize(("m", "guesses", "correct"), COUNTS)
def test_every_smaller_epsilon_is_rejected(
    m: int, guesses: int, correct: int, delta: float
) -> None:
    case: dict[str, Any] = {"delta": delta, "m": m, "guesses": guesses, "correct": correct}
    found = epsilon_exceeded(significance=0.05, **case)
    for epsilon in np.linspace(0.0, found, 50) if found else []:
        assert p_value(epsilon, **case) <= 0.05
    assert p_value(found + 1e-6, **case) > 0.05


def test_more_correct_guesses_never_lower_the_bound() -> None:
    for delta in (0.0, 1e-5, 1e-3):
        found = [
            epsilon_exceeded(delta=delta, m=300, guesses=80, correct=v, significance=0.05)
            for v in range(81)
        ]
        assert found == sorted(found)
        assert found[40] == 0.0 < found[-1]
    mus = [
        mu_exceeded(m=300, guesses=80, correct=v, significance=0.05, above=0.0) for v in range(81)
    ]
    assert mus == sorted(mus)
    assert mus[40] == 0.0 < mus[-1]


def test_a_larger_delta_never_raises_the_bound() -> None:
    found = [
        epsilon_exceeded(delta=delta, m=1000, guesses=200, correct=195, significance=0.05)
        for delta in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0.0


# ------------------------------------------------------------------ an independent implementation

PEER = """
import json, sys
import numpy as np
from jax_privacy import auditing
answers = []
for case in json.load(sys.stdin):
    scores, included = np.array(case["scores"]), np.array(case["included"])
    auditor = auditing.CanaryScoreAuditor(scores[included], scores[~included])
    at = auditing.Explicit(case["threshold"])
    significance, delta = case["significance"], case["delta"]
    answers.append([
        float(auditor.epsilon_one_run(significance, delta, threshold_strategy=at)),
        float(auditor.epsilon_one_run_fdp(significance, delta, threshold_strategy=at)),
    ])
print(json.dumps(answers))
"""


@pytest.mark.skipif(not JAX.exists(), reason="needs jax_privacy in .venv-jax")
def test_jax_privacy_finds_the_same() -> None:
    cases, ours = [], []
    for seed, (m, k, mu, delta) in enumerate(
        [(500, 40, 2.0, 1e-5), (500, 200, 1.0, 1e-5), (1000, 60, 3.0, 1e-6), (200, 20, 0.0, 1e-4)]
    ):
        generator = np.random.default_rng(seed)
        coins = generator.random(m) < 0.5
        scores = gaussian_scores(coins, mu, generator)
        threshold = np.sort(scores)[-k]
        cases.append(
            {
                "scores": scores.tolist(),
                "included": coins.tolist(),
                "threshold": threshold,
                "significance": 0.05,
                "delta": delta,
            }
        )
        ours.append(
            [
                lower_bound(scores, coins, delta=delta, guesses=(k, 0), curve=curve).epsilon
                for curve in ("approximate", "gaussian")
            ]
        )
    answer = subprocess.run(
        [JAX, "-c", PEER], input=json.dumps(cases), capture_output=True, text=True, timeout=100
    )
    assert answer.returncode == 0, answer.stderr
    theirs = np.array(json.loads(answer.stdout.splitlines()[-1]))
    np.testing.assert_allclose(np.array(ours), theirs, atol=2e-4)
    assert (theirs[:3] > 0.3).all()


# ------------------------------------------------------------------ mechanisms whose truth is known


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


@pytest.mark.parametrize("curve", ["approximate", "gaussian"])
@pytest.mark.parametrize("guesses", [None, (30, 30), (40, 0)])
@pytest.mark.parametrize("mu", [0.3, 1.5])
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


def test_a_gaussian_curve_at_its_worst() -> None:
    # One canary that is told all of: 'm = 1' is an ordinary hypothesis test with a fair prior.
    mu = 1.0
    accuracy = float(stats.norm.cdf(mu / 2))
    case: dict[str, int] = {"m": 1, "guesses": 1, "correct": 1}
    assert not rejects(mu, significance=accuracy - 1e-9, **case)
    assert rejects(mu, significance=accuracy + 1e-9, **case)


# ------------------------------------------------------------------ lower_bound


def coins_of(m: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(m) < 0.5


def test_guesses_are_the_ends_of_the_ranking() -> None:
    coins = np.array([True, True, False, True, False, False, True, False])
    scores = np.array([8, 7, 6, 5, 4, 3, 2, 1])
    result = lower_bound(scores, coins, delta=0.0, guesses=(3, 2), confidence=0.5)
    assert (result.guesses, result.correct, result.canaries) == ((3, 2), 3, 8)
    assert lower_bound(-scores, coins, delta=0.0, guesses=(3, 2)).correct == 1 + 0
    assert lower_bound(scores, coins, delta=0.0, guesses=(8, 0)).correct == 4


def test_trying_several_pays_for_each() -> None:
    coins = coins_of(1000)
    scores = gaussian_scores(coins, 2.0, np.random.default_rng(1))
    tried = default_guesses(1000)
    paid = 1 - 0.05 / len(tried)
    for curve in ("approximate", "gaussian"):
        result = lower_bound(scores, coins, delta=1e-5, curve=curve)  # type: ignore[arg-type]
        each = [
            lower_bound(
                scores,
                coins,
                delta=1e-5,
                guesses=pair,
                confidence=paid,
                curve=curve,  # type: ignore[arg-type]
            ).epsilon
            for pair in tried
        ]
        assert result.epsilon == pytest.approx(max(each), abs=1e-3)
        assert result.confidence == 0.95


@pytest.mark.parametrize("m", [1, 2, 3, 15, 16, 17, 100, 1000, 5001])
def test_default_guesses_fit(m: int) -> None:
    tried = default_guesses(m)
    assert tried
    assert len(set(tried)) == len(tried) <= 16
    assert all(1 <= top + bottom <= m for top, bottom in tried)


def test_equal_scores_show_nothing_even_if_the_canaries_are_sorted_by_coin() -> None:
    coins = np.sort(coins_of(2000))
    for order in (coins, coins[::-1]):
        for curve in ("approximate", "gaussian"):
            found = lower_bound(np.zeros(2000), order, delta=1e-5, curve=curve)  # type: ignore[arg-type]
            assert found.epsilon == 0.0


def test_tensors_are_taken() -> None:
    import torch

    coins = coins_of(100)
    scores = torch.tensor(coins, dtype=torch.float32, requires_grad=True)
    one = lower_bound(scores, torch.tensor(coins), delta=1e-5)
    assert one == lower_bound(coins, coins, delta=1e-5)
    assert one.epsilon > 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"delta": 1.0}, "delta must be at least 0 and below 1"),
    ({"delta": "small"}, "delta must be a number"),
    ({"delta": 0.0, "curve": "gaussian"}, "positive for curve='gaussian'"),
    ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
    ({"confidence": math.nan}, "confidence must lie between 0 and 1"),
    ({"curve": "laplace"}, "curve must be"),
    ({"guesses": (60, 60)}, "guesses must be two counts"),
    ({"guesses": (0, 0)}, "guesses must be two counts"),
    ({"guesses": (-1, 5)}, "guesses must be two counts"),
    ({"guesses": (5,)}, "guesses must be two counts"),
    ({"scores": np.full(100, np.nan)}, "100 NaN"),
    ({"scores": np.zeros(99)}, "one value per canary"),
    ({"included": np.arange(100) % 2}, "included must be boolean"),
    ({"included": np.ones(100, dtype=bool)}, "fair coins do not produce"),
    ({"included": np.zeros(100, dtype=bool)}, "fair coins do not produce"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    fine = {"scores": np.arange(100), "included": np.arange(100) % 2 == 0, "delta": 1e-5}
    arguments = {**fine, **wrong}
    scores, included = arguments.pop("scores"), arguments.pop("included")
    with pytest.raises(ValueError, match=message):
        lower_bound(scores, included, **arguments)


# ------------------------------------------------------------------ coins


def test_coins_are_fair_independent_and_new_each_time() -> None:
    coins = coin_flips(40_001)
    assert coins.shape == (40_001,)
    assert abs(coins.mean() - 0.5) < 6 * 0.5 / math.sqrt(40_000)
    for lag in (1, 7, 8, 64):
        agree = (coins[lag:] == coins[:-lag]).mean()
        assert abs(agree - 0.5) < 6 * 0.5 / math.sqrt(40_000)
    assert (coin_flips(200) != coin_flips(200)).any()


def test_canaries_left_out_are_left_out() -> None:
    coins = np.array([True, False, False])
    canaries = Canaries(np.array([2, 5, 9]), coins)
    coins[:] = True
    assert canaries.training_indices(10) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert len(canaries) == 3
    assert "True" not in repr(canaries)
    with pytest.raises(ValueError, match="num_samples must exceed the largest index, 9"):
        canaries.training_indices(9)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "non-empty sequence of integers"),
        ([0.5], "non-empty sequence of integers"),
        ([1, 1], "each once"),
        ([-1, 1], "at least 0"),
        ([[1, 2]], "non-empty sequence of integers"),
    ],
)
def test_canaries_refuse(indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Canaries.draw(indices)


@pytest.mark.parametrize("m", [0, -1, 2.0, True])
def test_coin_flips_refuses(m: Any) -> None:
    with pytest.raises(ValueError, match="m must be a positive integer"):
        coin_flips(m)
