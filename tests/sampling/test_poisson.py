"""Test that each index is in each batch with probability q, independently of all other indices and batches.

``test_trials.py`` shows that single trials are exact; this file tests the sampler that uses them.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgrad.sampling import PoissonSampler
from tests.dp_tools import through_a_file
from tests.nightly import every
from tests.sampling.checks import check_poisson, membership, seeded

# ------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("q", every(2, [0.02, 0.3, 0.9]))
@pytest.mark.parametrize("generator", [None, seeded(7)], ids=["system", "seeded"])
def test_batches_are_poisson(q: float, generator: torch.Generator | None) -> None:
    sampler = PoissonSampler(40, sample_rate=q, steps=6000, generator=generator)
    table = membership(list(sampler), 40)
    check_poisson(table, q)
    for wrong in (q * 2 / 3, min(q * 3 / 2, (1 + q) / 2)):
        with pytest.raises(AssertionError):
            check_poisson(table, wrong)


def test_batches_of_a_fixed_size_are_found() -> None:
    generator = seeded()
    shuffled = [torch.randperm(40, generator=generator)[:12].tolist() for _ in range(6000)]
    with pytest.raises(AssertionError):
        check_poisson(membership(shuffled, 40), 0.3)


def test_one_shuffle_per_epoch_is_found() -> None:
    generator = seeded()
    epochs = [torch.randperm(40, generator=generator).split(4) for _ in range(600)]
    with pytest.raises(AssertionError):
        check_poisson(membership([batch.tolist() for epoch in epochs for batch in epoch], 40), 0.1)


def test_a_tiny_rate_is_exact() -> None:
    """Every index can be sampled; gaps in float32 would be multiples of 64, so all of them even."""
    size = 10**9
    batches = list(PoissonSampler(size, sample_rate=1e-9, steps=2000, generator=seeded()))
    counts = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    assert abs(counts.mean() - 1) < 8 / math.sqrt(2000)
    assert abs((counts == 0).double().mean() - math.exp(-1)) < 8 * 0.5 / math.sqrt(2000)
    where = torch.tensor([index for batch in batches for index in batch]) / size
    assert abs(where.mean() - 0.5) < 8 / math.sqrt(12 * len(where))
    odd = torch.tensor([batch[0] % 2 for batch in batches if batch], dtype=torch.float64)
    assert abs(odd.mean() - 0.5) < 8 * 0.5 / math.sqrt(len(odd))


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True), st.integers(0, 2**32))
def test_batches_hold_valid_indices_in_order(size: int, q: float, seed: int) -> None:
    sampler = PoissonSampler(size, sample_rate=q, steps=3, generator=seeded(seed))
    batches = list(sampler)
    assert len(batches) == 3
    for batch in batches:
        assert batch == sorted(set(batch))
        assert all(type(index) is int and 0 <= index < size for index in batch)
        assert q < 1 or batch == list(range(size))


# -------------------------------------------------------------------------------------- state


def test_lengths_and_rates() -> None:
    by_size = PoissonSampler(1000, expected_batch_size=64)
    assert (by_size.sample_rate, by_size.expected_batch_size, len(by_size)) == (0.064, 64, 16)
    by_rate = PoissonSampler(1000, sample_rate=0.5)
    assert (by_rate.sample_rate, by_rate.expected_batch_size, len(by_rate)) == (0.5, 500, 2)
    assert len(PoissonSampler(10, expected_batch_size=10)) == 1
    assert len(PoissonSampler(10, sample_rate=0.9)) == 1
    assert len(PoissonSampler(10, sample_rate=5e-324)) == 2**62
    steps = PoissonSampler(10, sample_rate=0.5, steps=7)
    assert len(steps) == len(list(steps)) == len(list(steps)) == 7


def test_private_batches_are_never_the_same() -> None:
    sampler = PoissonSampler(200, sample_rate=0.5, steps=2)
    list(sampler)
    others = [copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    state = sampler.state_dict()
    assert "generator" not in state
    restored = PoissonSampler(200, sample_rate=0.5, steps=2)
    restored.load_state_dict(state)
    sampler.load_state_dict(state)
    everyone = [sampler, restored, *others, PoissonSampler(200, sample_rate=0.5, steps=2)]
    batches = [batch for each in everyone for batch in each]
    assert len({tuple(batch) for batch in batches}) == 2 * len(everyone)


def test_a_private_sampler_keeps_no_randomness() -> None:
    """A fork, a copy and a checkpoint share no random words."""
    sampler = PoissonSampler(200, sample_rate=0.5, steps=2)
    before, global_state = dict(vars(sampler)), torch.get_rng_state()
    list(sampler)
    assert vars(sampler) == {**before, "_done": 2}
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not any(isinstance(v, torch.Tensor | torch.Generator) for v in before.values())


@pytest.mark.parametrize("done", range(6))
def test_a_seeded_iteration_continues_exactly(done: int) -> None:
    def sampler(seed: int) -> PoissonSampler:
        return PoissonSampler(100, sample_rate=0.2, steps=5, generator=seeded(seed))

    whole = sampler(1)
    expected = list(whole) + list(whole) + list(whole)

    interrupted = sampler(1)
    batches = list(interrupted)
    iteration = iter(interrupted)
    batches += [next(iteration) for _ in range(done)]
    restored = sampler(2)
    restored.load_state_dict(through_a_file(interrupted.state_dict()))
    if done < 5:
        batches += list(restored)
    assert batches + list(restored) == expected
    assert len(list(restored)) == 5


def test_a_private_iteration_continues_for_as_long() -> None:
    sampler = PoissonSampler(100, sample_rate=0.2, steps=5)
    iteration = iter(sampler)
    next(iteration), next(iteration)
    state = sampler.state_dict()
    restored = PoissonSampler(100, sample_rate=0.2, steps=5)
    restored.load_state_dict(state)
    assert [len(list(restored)), len(list(restored))] == [3, 5]
    assert len(list(iteration)) == 3


def test_states_that_do_not_fit() -> None:
    private = PoissonSampler(9, sample_rate=0.5, steps=4)
    seeded_one = PoissonSampler(9, sample_rate=0.5, steps=4, generator=seeded())
    with pytest.raises(ValueError, match=r"PoissonSampler.state_dict.*got.*SystemNoise"):
        private.load_state_dict({"kind": "SystemNoise", "format": 1})
    with pytest.raises(ValueError, match="state has a generator's state"):
        private.load_state_dict(seeded_one.state_dict())
    with pytest.raises(ValueError, match="state lacks a generator's state"):
        seeded_one.load_state_dict(private.state_dict())
    iteration = iter(private)
    next(iteration), next(iteration), next(iteration)
    with pytest.raises(ValueError, match="3 batches into an iteration, but steps is 3"):
        PoissonSampler(9, sample_rate=0.5, steps=3).load_state_dict(private.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample_rate": 0.0}, ValueError, "sample_rate must be positive and at most 1, got 0.0"),
        ({"sample_rate": 1.5}, ValueError, "sample_rate.*got 1.5"),
        ({"sample_rate": math.nan}, ValueError, "sample_rate.*got nan"),
        ({"sample_rate": "1"}, TypeError, "sample_rate must be a real number, got '1'"),
        ({"expected_batch_size": 11}, ValueError, "expected_batch_size.*at most 10, got 11"),
        ({"expected_batch_size": -1}, ValueError, "expected_batch_size.*got -1"),
        ({}, ValueError, "None and None; give exactly one"),
        ({"sample_rate": 0.1, "expected_batch_size": 1}, ValueError, "1 and 0.1; give exactly"),
        ({"sample_rate": 0.1, "steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"sample_rate": 0.1, "steps": 2.0}, TypeError, "steps must be an integer, got 2.0"),
        ({"sample_rate": 0.1, "generator": 3}, TypeError, "generator must be.*got 3"),
        ({"sample_rate": 0.1, "num_samples": 2**57}, ValueError, "num_samples.*at most.*got 14411"),
        (
            {"sample_rate": 0.1, "max_batch_size": 0},
            ValueError,
            "max_batch_size.*at least 1, got 0",
        ),
        ({"sample_rate": 0.1, "num_samples": 0}, ValueError, "num_samples.*got 0"),
        ({"sample_rate": 0.1, "num_samples": True}, TypeError, "num_samples.*got True"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PoissonSampler(**{"num_samples": 10, **arguments})
