"""``lower_bound`` and the coins: which guesses count, ties, arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from clipgrad.audit import Canaries, coin_flips, lower_bound
from clipgrad.audit._bound import default_guesses
from tests.audit_tools import gaussian_scores


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
