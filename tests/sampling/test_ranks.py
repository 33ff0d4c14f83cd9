"""Test that ranks that each sample from their own share form one Poisson sample of all data."""

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from clipgrad.sampling import PoissonSampler, UserSampler, poisson_loader
from tests.sampling.checks import (
    allowed,
    check_poisson,
    membership,
    outcomes,
    p_value,
    poisson,
    seeded,
    subsets,
)


def all_ranks(size: int, replicas: int, q: float, **options: Any) -> list[PoissonSampler]:
    return [
        PoissonSampler(size, sample_rate=q, rank=rank, num_replicas=replicas, **options)
        for rank in range(replicas)
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("size", [1, 3, 10, 17])
def test_shares_partition_the_dataset(size: int, replicas: int) -> None:
    samplers = all_ranks(size, replicas, 1.0, steps=2)
    shares = [next(iter(sampler)) for sampler in samplers]
    assert sorted(itertools.chain(*shares)) == list(range(size))
    for rank, share in enumerate(shares):
        assert share == list(range(rank, size, replicas))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("size", "replicas"), [(5, 2), (6, 3), (3, 5)])
def test_the_union_is_exactly_poisson(size: int, replicas: int) -> None:
    """Ranks draw different random words, so their probabilities multiply."""
    q = 0.3
    samplers = all_ranks(size, replicas, q)
    union: Counter[frozenset[int]] = Counter({frozenset(): Fraction(1)})  # type: ignore[dict-item]
    for sampler in samplers:
        share = sampler._share
        drawn = outcomes(sampler._trials, len(share))
        union = Counter(
            {
                before | frozenset(share[i] for i in chosen): p * more  # type: ignore[misc]
                for before, p in union.items()
                for chosen, more in drawn.items()
            }
        )
    for chosen in subsets(size):
        wanted = poisson(chosen, size, q)
        assert abs(union[chosen] / wanted - 1) <= size * allowed(samplers[0]._trials)


def test_ranks_are_independent() -> None:
    samplers = [
        PoissonSampler(6, sample_rate=0.4, steps=5_000, rank=r, num_replicas=3, generator=seeded(r))
        for r in range(3)
    ]
    drawn = [list(itertools.chain(*parts)) for parts in zip(*samplers, strict=True)]
    exact = {chosen: float(poisson(chosen, 6, 0.4)) for chosen in subsets(6)}
    assert p_value(drawn, exact) > 1e-3
    same = [
        PoissonSampler(6, sample_rate=0.4, steps=5_000, rank=r, num_replicas=3, generator=seeded(0))
        for r in range(3)
    ]
    drawn = [list(itertools.chain(*parts)) for parts in zip(*same, strict=True)]
    assert p_value(drawn, exact) < 1e-6


def test_private_ranks_are_one_poisson_sample() -> None:
    samplers = all_ranks(40, 4, 0.3, steps=6000)
    drawn = [sorted(itertools.chain(*parts)) for parts in zip(*samplers, strict=True)]
    check_poisson(membership(drawn, 40), 0.3)


def test_the_constants_are_global() -> None:
    samplers = [
        PoissonSampler(1000, expected_batch_size=64, rank=rank, num_replicas=7) for rank in range(7)
    ]
    alone = PoissonSampler(1000, expected_batch_size=64)
    for sampler in samplers:
        assert len(sampler) == len(alone) == 16
        assert sampler.expected_batch_size == 64
        assert sampler.sample_rate == alone.sample_rate


def test_more_ranks_than_samples() -> None:
    data = TensorDataset(torch.arange(2))
    loaders = [
        poisson_loader(data, sample_rate=1.0, steps=3, rank=rank, num_replicas=4)
        for rank in range(4)
    ]
    drawn = [[batch[0].tolist() for batch in loader] for loader in loaders]
    assert drawn == [[[0]] * 3, [[1]] * 3, [[]] * 3, [[]] * 3]


def test_ranks_of_users() -> None:
    ids = [0, 1, 2, 0, 1, 2, 0]
    shares = [
        next(iter(UserSampler(ids, sample_rate=1.0, rank=rank, num_replicas=2)))
        for rank in range(2)
    ]
    assert shares == [[[0, 3, 6], [2, 5]], [[1, 4]]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank and num_replicas are 0 and None; give both"),
        ({"num_replicas": 2}, ValueError, "rank and num_replicas are None and 2; give both"),
        ({"rank": 2, "num_replicas": 2}, ValueError, "rank must be.*num_replicas = 2, got 2"),
        ({"rank": -1, "num_replicas": 2}, ValueError, "rank must be at least 0.*got -1"),
        ({"rank": 0.0, "num_replicas": 2}, TypeError, "rank must be an integer, got 0.0"),
        ({"rank": 0, "num_replicas": 0}, ValueError, "num_replicas must be at least 1, got 0"),
        (
            {"rank": 0, "num_replicas": 2, "max_batch_size": 3},
            ValueError,
            "max_batch_size = 3 and num_replicas = 2 exclude each other",
        ),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PoissonSampler(10, sample_rate=0.5, **arguments)
