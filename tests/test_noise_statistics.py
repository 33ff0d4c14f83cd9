"""A hundred million values of either source beside the exact Gaussian. The keys are fixed: nothing here can flake.

Every bound is five standard errors of its own statistic, for one stream of 1e8 values that all checks share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import scipy.stats
import torch
from torch import Tensor

from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise, keys

VALUES, CHUNK = 100_000_000, 1_000_000
STEP, REACH = 512, 8  # a bin is 1/512 wide, from -8 to 8
SIGMA = 0.75


@dataclass
class Found:
    """What is kept of the stream."""

    powers: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))
    bins: Tensor = field(default_factory=lambda: torch.zeros(2 * REACH * STEP, dtype=torch.int64))
    # Sums of products: neighbours, the next but one, the next tensor, the next call; of squares too.
    products: Tensor = field(default_factory=lambda: torch.zeros(2, 4, dtype=torch.float64))
    largest: float = 0.0

    @property
    def n(self) -> float:
        return float(self.powers[0])

    def take(self, x: Tensor, before: Tensor) -> None:
        """Two tensors of one call, as rows, and the call's before it."""
        flat = x.flatten().double()
        square = flat * flat
        for power, values in enumerate([None, flat, square, square * flat, square * square]):
            self.powers[power] += flat.numel() if values is None else values.sum()
        index = ((x.flatten() + REACH) * STEP).floor_().clamp_(0, len(self.bins) - 1).int()
        self.bins += torch.bincount(index, minlength=len(self.bins))
        self.largest = max(self.largest, float(x.abs().max()))
        for row, (one, other) in enumerate([(x, before), (x * x - 1, before * before - 1)]):
            a, b = one.flatten(), one[0]
            lagged = [(a[1:], a[:-1]), (a[2:], a[:-2]), (b, one[1]), (a, other.flatten())]
            for column, (left, right) in enumerate(lagged):
                self.products[row, column] += torch.dot(left, right).double()


def stream(source: NoiseSource) -> Found:
    found, before = Found(), torch.zeros(2, CHUNK // 2)
    for _ in range(VALUES // CHUNK):
        tensors = list(torch.zeros(2, CHUNK // 2))
        source.add_gaussian_(tensors, SIGMA)
        x = torch.stack(tensors).div_(SIGMA)
        found.take(x, before)
        before = x
    return found


@pytest.fixture(
    scope="module",
    params=[
        "system",
        pytest.param("uncompiled", marks=pytest.mark.nightly),
        pytest.param("seeded", marks=pytest.mark.nightly),
    ],
)
def found(request: pytest.FixtureRequest) -> Found:
    if request.param == "seeded":
        return stream(SeededNoise(torch.Generator().manual_seed(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "new_master", lambda: bytes(range(32)))
        patch.setattr(torch, "get_num_threads", lambda: 1)
        return stream(SystemNoise(compile=request.param == "system"))


def test_moments(found: Found) -> None:
    """Mean, variance, skewness and kurtosis; Var of x, x^2, x^3 - 3x and x^4 - 6x^2 + 3 is k!."""
    n = found.n
    assert n == VALUES
    mean, second, third, fourth = (found.powers[1:] / n).tolist()
    assert abs(mean) < 5 / math.sqrt(n)
    assert abs(second - 1) < 5 * math.sqrt(2 / n)
    variance = second - mean**2
    skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    kurtosis = central / variance**2
    assert abs(skewness) < 5 * math.sqrt(6 / n)
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / n)


@pytest.mark.parametrize("bound", [3, 4, 5, 6])
def test_tails(found: Found, bound: int) -> None:
    """Beyond 6 sigma 0.2 values are expected: the binomial distribution itself is asked."""
    for side in (found.bins[: (REACH - bound) * STEP], found.bins[(REACH + bound) * STEP :]):
        count = int(side.sum())
        expected = float(scipy.stats.norm.sf(bound))
        at_five = 2 * scipy.stats.norm.sf(5)
        assert scipy.stats.binomtest(count, VALUES, expected).pvalue > at_five
    if bound == 6:
        assert found.largest < 8


def test_distribution(found: Found) -> None:
    """Kolmogorov and Smirnov at 8191 edges, and Pearson's chi-square where bins hold enough."""
    edges = torch.arange(1, len(found.bins)).double() / STEP - REACH
    below = found.bins.cumsum(0)[:-1].double() / found.n
    exact = torch.from_numpy(scipy.stats.norm.cdf(edges.numpy()))
    distance = float((below - exact).abs().max())
    assert scipy.stats.kstwobign.sf(distance * math.sqrt(found.n)) > 1e-6
    expected = torch.diff(exact) * found.n
    enough = expected > 100
    chi2 = float(((found.bins[1:-1] - expected)[enough].square() / expected[enough]).sum())
    freedom = int(enough.sum())
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_independence(found: Found) -> None:
    """Neighbours, tensors of a call, calls; of the values and of their squares."""
    n = torch.tensor([VALUES, VALUES, VALUES / 2, VALUES], dtype=torch.float64)
    variances = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    errors = found.products / (n * variances).sqrt()
    assert errors.abs().max() < 5


def test_the_checks_find_what_they_look_for() -> None:
    """Noise 0.1 % too large, shifted by 0.001, of 23-bit uniforms, repeated in the next call."""

    class Wrong:
        def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
            self._change, self._generator = change, torch.Generator().manual_seed(1)

        def add_gaussian_(self, tensors: list[Tensor], sigma: float) -> None:
            for tensor in tensors:
                drawn = torch.randn(tensor.shape, generator=self._generator)
                tensor += sigma * self._change(drawn)

    def fails(change: Callable[[Tensor], Tensor], check: Callable[[Found], None]) -> None:
        bad = stream(Wrong(change))  # type: ignore[arg-type]
        with pytest.raises(AssertionError):
            check(bad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "VALUES", VALUES // 10)
        fails(lambda x: x * 1.002, test_moments)
        fails(lambda x: x + 0.003, test_moments)
        fails(lambda x: x.clamp(-4, 4), lambda f: test_tails(f, 4))
        fails(lambda x: (x * 32).round() / 32, test_distribution)
        fails(lambda x: x + 0.01 * x.roll(1), test_independence)


@pytest.mark.parametrize("draws", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sigma_does_not_depend_on_draws(
    draws: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "new_master", lambda: bytes([draws]) * 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    total = torch.zeros(1_000_000, dtype=dtype)
    SystemNoise(draws=draws).add_gaussian_([total], 3.0)
    assert abs(float(total.double().square().mean()) / 9 - 1) < 5 * math.sqrt(2e-6) + 1e-4
    z = total.double() / 3
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96e-6) + 1e-3


def test_two_keys_and_two_calls_do_not_correlate(monkeypatch: pytest.MonkeyPatch) -> None:
    masters = iter([bytes([1]) * 32, bytes([1]) * 31 + b"\0"])
    monkeypatch.setattr(keys, "new_master", lambda: next(masters))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rows = torch.zeros(3, 1_000_000)
    first, other = SystemNoise(), SystemNoise()
    first.add_gaussian_([rows[0]], 1.0)
    other.add_gaussian_([rows[1]], 1.0)
    assert first._process_noise is not None
    first.add_gaussian_([rows[2]], 1.0)
    correlations = torch.corrcoef(rows.double()) - torch.eye(3)
    assert correlations.abs().max() < 5 / math.sqrt(rows.shape[1])
