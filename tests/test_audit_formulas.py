"""The mathematics of an audit against the papers' formulas and other people's code."""

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

from clipgrad.audit import lower_bound
from clipgrad.audit._approximate import epsilon_exceeded, p_value
from clipgrad.audit._gaussian import mu_exceeded
from tests.audit_tools import gaussian_scores

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
