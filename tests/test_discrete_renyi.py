"""The Renyi divergences that accounting claims for discrete Gaussian noise, found by direct summation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import logsumexp

Shift = tuple[int, ...]

CASES = [
    (scale, shift)
    for scale in (0.3, 0.5, 1.0, 2.5)
    for shift in ((1,), (2,), (1, 1), (2, -1))
    if math.hypot(*shift) / scale < 5  # else exp(alpha^2 mu^2 / 2 sigma^2) overflows
]
ORDERS = (2, 3, 5, 8)
RATES = (0.01, 0.3, 1.0)


def log_probabilities(scale: float, shift: Shift, reach: int) -> np.ndarray:
    """Of the discrete Gaussian around ``shift`` at every lattice point within ``reach`` of the origin."""
    axis = np.arange(-reach, reach + 1)
    each = []
    for mu in shift:
        weights = -((axis - mu) ** 2) / (2 * scale**2)
        each.append(weights - logsumexp(-(axis**2) / (2 * scale**2)))
    grid = each[0]
    for other in each[1:]:
        grid = grid[..., None] + other
    return grid


def mixture(at_zero: np.ndarray, at_shift: np.ndarray, rate: float) -> np.ndarray:
    """With probability ``rate`` the sample is there."""
    if rate == 1.0:
        return at_shift
    return np.logaddexp(math.log1p(-rate) + at_zero, math.log(rate) + at_shift)


def divergence(p: np.ndarray, q: np.ndarray, order: float) -> float:
    return float(logsumexp(order * p - (order - 1) * q)) / (order - 1)


def both(scale: float, shift: Shift, rate: float, order: float) -> tuple[float, float]:
    """Of (with, without) the sample, and of (without, with)."""
    reach = math.ceil((order + 1) * max(map(abs, shift)) + 40 * scale)
    zero = log_probabilities(scale, tuple(0 for _ in shift), reach)
    mixed = mixture(zero, log_probabilities(scale, shift, reach), rate)
    return divergence(mixed, zero, order), divergence(zero, mixed, order)


def claimed(scale: float, shift: Shift, rate: float, order: int) -> float:
    """Of the Gaussian at an integer order (Mironov, Talwar and Zhang 2019, arXiv:1908.10530)."""
    squared = sum(mu**2 for mu in shift) / scale**2
    if rate == 1.0:
        return order * squared / 2
    terms = [
        math.log(math.comb(order, k))
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) * squared / 2
        for k in range(order + 1)
    ]
    return float(logsumexp(terms)) / (order - 1)


@pytest.mark.parametrize(("scale", "shift"), CASES)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("order", ORDERS)
def test_integer_orders(scale: float, shift: Shift, rate: float, order: int) -> None:
    """Adding a sample costs exactly as much as with the Gaussian, removing one not more."""
    bound = claimed(scale, shift, rate, order)
    adding, removing = both(scale, shift, rate, order)
    assert math.isclose(adding, bound, rel_tol=1e-8, abs_tol=1e-13)
    assert removing <= bound * (1 + 1e-8) + 1e-13


@pytest.mark.parametrize(("scale", "shift"), CASES)
@pytest.mark.parametrize("order", [1.1, 1.5, 2.5, 4.7])
def test_every_order_without_sampling(scale: float, shift: Shift, order: float) -> None:
    """Canonne, Kamath and Steinke 2020, proposition 5: at most ``alpha mu^2 / (2 sigma^2)``."""
    bound = order * sum(mu**2 for mu in shift) / (2 * scale**2)
    assert max(both(scale, shift, 1.0, order)) <= bound * (1 + 1e-8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rate", RATES)
def test_a_shorter_shift_costs_less(order: int, rate: float) -> None:
    """So the bound for the norm C holds for every sample within it."""
    shifts = sorted(itertools.product(range(4), repeat=2), key=lambda shift: math.hypot(*shift))
    found = [both(1.5, shift, rate, order)[0] for shift in shifts]
    lengths = [math.hypot(*shift) for shift in shifts]
    for (one, short), (other, long) in itertools.pairwise(zip(found, lengths, strict=True)):
        assert one <= other * (1 + 1e-8) + 1e-13 or math.isclose(short, long)


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_the_formula_is_the_accountants(rate: float) -> None:
    """At integer orders ``claimed`` is what dp-accounting uses for the sampled Gaussian."""
    dp = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    for scale in (0.5, 1.0, 2.5):
        accountant = rdp.RdpAccountant(orders=list(ORDERS))
        accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(scale)))
        for order, found in zip(ORDERS, accountant.rdp, strict=True):
            assert math.isclose(found, claimed(scale, (1,), rate, order), rel_tol=1e-9)
