"""Test the description of each sampler for the accountant."""

from clipgrad.accounting import Poisson, TruncatedPoisson
from clipgrad.sampling import PoissonSampler, UserSampler


def test_descriptions() -> None:
    wanted = Poisson(0.25)
    assert PoissonSampler(100, expected_batch_size=25).sampling == wanted
    assert PoissonSampler(100, sample_rate=0.25, rank=1, num_replicas=4).sampling == wanted
    ids = ["a", "b", "a", "c", "d"]
    assert UserSampler(ids, expected_users=1).sampling == wanted
    sampler = PoissonSampler(100, sample_rate=0.25, max_batch_size=30)
    assert sampler.sampling == TruncatedPoisson(0.25, 100, 30)
    assert UserSampler(ids, expected_users=1, max_users=2).sampling == TruncatedPoisson(0.25, 4, 2)
