"""Epsilon against numerical integration of the hockey-stick divergence, in both directions."""

from typing import Any

import numpy as np
import pytest

from clipgrad.accounting import Ledger, Poisson, TruncatedPoisson, epsilon
from tests.hockey_stick import Mixture, delta, delta_of_steps, epsilon_at, group, nothing, one_step
from tests.nightly import every, rows, some

# The grid rounds upwards, by less than this; the oracle is exact to about 1e-9.
ROUNDING = 3e-4


def assert_equal(ours: float, exact: float) -> None:
    assert exact - 1e-6 <= ours <= exact * (1 + ROUNDING) + 1e-5


@pytest.mark.parametrize(("q", "sigma"), rows(2, [(0.01, 0.8), (0.2, 1.0), (0.6, 2.0)]))
@pytest.mark.parametrize("target", [1e-5, 1e-3])
def test_one_step(q: float, sigma: float, target: float) -> None:
    there, gone = one_step(q, sigma), nothing(sigma)
    removed = epsilon_at(target, lambda e: delta(there, gone, e))
    added = epsilon_at(target, lambda e: delta(gone, there, e))
    ours = epsilon(noise_multiplier=sigma, sample_rate=q, steps=1, delta=target)
    assert_equal(ours, max(removed, added))
    ledger = Ledger()
    ledger.record(sigma, Poisson(q))
    assert ledger.delta(ours) == pytest.approx(target, rel=1e-3)
    by_rdp = epsilon(noise_multiplier=sigma, sample_rate=q, steps=1, delta=target, accountant="rdp")
    assert max(removed, added) <= by_rdp


@pytest.mark.parametrize(("q", "sigma"), [(0.05, 0.8), (0.4, 1.0)])
def test_one_replacement(q: float, sigma: float) -> None:
    """Sensitivity is two clip norms and the noise `sigma` times that; one sample goes, another comes."""
    before, after = one_step(q, 2 * sigma), one_step(q, 2 * sigma, -1.0)
    exact = epsilon_at(1e-4, lambda e: delta(before, after, e))
    ours = epsilon(
        noise_multiplier=sigma, sample_rate=q, steps=1, delta=1e-4, relation="replace_one"
    )
    assert_equal(ours, exact)


@pytest.mark.parametrize(
    "steps",
    every(3, [[(0.05, 0.7), (0.3, 1.5)], [(0.1, 0.8), (0.1, 0.8)], [(0.1, 0.8), (0.3, 1.5)] * 2]),
)
def test_steps_with_other_noise_and_sampling(steps: list[tuple[float, float]]) -> None:
    target, steps = 1e-4, steps[:3]

    def exact(removed: bool) -> float:
        return epsilon_at(
            target, lambda e: float(delta_of_steps(steps, np.array(e), removed=removed))
        )

    ledger = Ledger()
    for q, sigma in steps:
        ledger.record(sigma, Poisson(q))
    assert_equal(ledger.epsilon(target), max(exact(True), exact(False)))


def test_the_oracles_agree() -> None:
    there, gone = one_step(0.1, 0.8), nothing(0.8)
    for e in (0.0, 0.3, 2.0):
        at = np.array(e)
        once = delta_of_steps([(0.1, 0.8)], at, removed=True)
        assert float(once) == pytest.approx(delta(there, gone, e), abs=1e-12)
        once = delta_of_steps([(0.1, 0.8)], at, removed=False)
        assert float(once) == pytest.approx(delta(gone, there, e), abs=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("size", "q", "sigma"),
    [(2, 0.05, 1.5), pytest.param(5, 0.2, 4.0, marks=pytest.mark.nightly)],
)
def test_a_group(size: int, q: float, sigma: float) -> None:
    there, gone = group(size, q, sigma), nothing(sigma)
    removed = epsilon_at(1e-4, lambda e: delta(there, gone, e))
    added = epsilon_at(1e-4, lambda e: delta(gone, there, e))
    ours = epsilon(noise_multiplier=sigma, sample_rate=q, steps=1, delta=1e-4, group_size=size)
    assert_equal(ours, max(removed, added))


@pytest.mark.parametrize(
    ("others", "sampling"), some(9, [-1.0, 0.0, 1.0], [(20, 0.3, 6), (8, 0.5, 2), (50, 0.1, 12)])
)
def test_a_truncated_batch_reveals_at_most_the_bound(
    others: float, sampling: tuple[int, float, int]
) -> None:
    """All the other samples are alike, as bad as they can be: a sample that is pushed out is one of them."""
    n, q, most = sampling
    sigma = 2.0
    chances = [1.0]  # of how many others are drawn
    for _ in range(n - 1):
        chances = [
            (1 - q) * (chances[k] if k < len(chances) else 0) + q * (chances[k - 1] if k else 0)
            for k in range(len(chances) + 1)
        ]
    without = Mixture(chances, [others * min(k, most) for k in range(n)], sigma)
    weights: list[float] = []
    means: list[float] = []
    for k, chance in enumerate(chances):
        stays = q * min(1.0, most / (k + 1))
        weights += [chance * stays, chance * (1 - stays)]
        means += [1.0 + others * min(k, most - 1), others * min(k, most)]
    there = Mixture(weights, means, sigma)
    target = 1e-4
    exact = max(
        epsilon_at(target, lambda e: delta(there, without, e)),
        epsilon_at(target, lambda e: delta(without, there, e)),
    )
    run: dict[str, Any] = {"noise_multiplier": sigma, "steps": 1, "delta": target}
    bound = epsilon(sampling=TruncatedPoisson(q, n, most), **run)
    assert exact <= bound + 1e-6
    assert epsilon(sample_rate=q, **run) <= bound + 1e-6
