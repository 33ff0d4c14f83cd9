"""Samplers describe themselves to the accountant."""

import pytest

from clipgrad import accounting
from clipgrad.sampling import PoissonSampler, UserSampler

pytestmark = pytest.mark.xfail(strict=False, reason="comes with the accounting branch")


def test_poisson() -> None:
    description = accounting.Poisson(0.25)  # type: ignore[attr-defined]
    assert PoissonSampler(100, expected_batch_size=25).sampling == description
    assert PoissonSampler(100, sample_rate=0.25, rank=1, num_replicas=4).sampling == description
    assert UserSampler(["a", "b", "a", "c", "d"], expected_users=1).sampling == description


def test_truncated() -> None:
    described = accounting.TruncatedPoisson  # type: ignore[attr-defined]
    sampler = PoissonSampler(100, sample_rate=0.25, max_batch_size=30)
    assert sampler.sampling == described(0.25, 100, 30)
    users = UserSampler(["a", "b", "a", "c", "d"], expected_users=1, max_users=2)
    assert users.sampling == described(0.25, 4, 2)
