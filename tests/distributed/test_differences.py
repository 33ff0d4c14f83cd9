"""Test that a rank that differs is named, and that sampling and accounting are those of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clipgrad.errors import RanksError
from tests.distributed import difference_cases as cases
from tests.distributed.conftest import Pool


def refused(pool: Pool, function: Callable[..., Any], *arguments: Any) -> set[str]:
    """Return the distinct messages of ranks that all refuse."""
    messages = set()
    for good, error in pool(2).outcomes(function, *arguments):
        assert not good
        assert error[0] == RanksError.__name__, error[2]
        messages.add(error[1])
    return messages


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_grad_norm", (1.0, 2.0)),
        ("noise_multiplier", (1.0, 0.5)),
        ("expected_batch_size", (4.0, 8.0)),
    ],
)
def test_settings(pool: Pool, name: str, values: tuple[float, float]) -> None:
    (message,) = refused(pool, cases.settings, name, values)
    assert f"{name} is {values[0]} on rank 0, but {values[1]} on rank 1" in message


@pytest.mark.parametrize(
    "other",
    [{"steps": 7}, {"noise_multiplier": 1.5}, {"delta": 1e-4}, {"num_samples": 41}],
    ids=str,
)
def test_plans(pool: Pool, other: dict[str, Any]) -> None:
    (message,) = refused(pool, cases.plans, ({}, other))
    (name,) = other
    assert name in message


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (cases.schedule, "step 1: max_grad_norm is 1.0 on rank 0, but 2.0 on rank 1"),
        (cases.changed_multiplier, "step 1: sigma is 1.0 on rank 0, but 0.5 on rank 1"),
        (cases.changed_parameters, "step 100: parameters is"),
        (cases.frozen, "step 1: the list of trained parameters is"),
    ],
)
def test_steps(pool: Pool, function: Callable[..., Any], expected: str) -> None:
    (message,) = refused(pool, function)
    assert expected in message


def test_a_rank_that_leaves_out_a_batch_is_found(pool: Pool) -> None:
    (message,) = refused(pool, cases.sampled, True)
    assert "step 2: the position in the plan is" in message


def test_ranks_sample_disjoint_parts_and_account_for_one_run(pool: Pool) -> None:
    first, second = pool(2).run(cases.sampled)
    assert first[:3] == second[:3]
    assert first[0] == 6
    for rank, (*_, seen) in enumerate((first, second)):
        assert len(seen) == 6
        assert all(number % 2 == rank for batch in seen for number in batch)
    assert first[1] == pytest.approx(cases.plan().epsilon())


def test_users_are_disjoint(pool: Pool) -> None:
    assert pool(2).run(cases.users) == [[0, 2, 4], [1, 3, 5]]


def test_whole_data_on_each_rank_is_refused(pool: Pool) -> None:
    for good, error in pool(2).outcomes(cases.whole_data_on_each_rank):
        assert not good
        assert error[0] == "UnaccountedBatchError"
        assert "samples from part 0 of 1 of the data, but 2 ranks train together" in error[1]


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("shuffled", "ValueError", "shuffled_loader makes the batches of one process"),
        ("truncated", "ValueError", "no analysis covers ranks that truncate separately"),
        ("grid", "ValueError", "exact mode"),
        ("grid on shards", "ValueError", "without fully_shard"),
        ("pickle", "TypeError", "Save its state_dict"),
    ],
)
def test_refused(pool: Pool, what: str, error: str, words: str) -> None:
    for good, found in pool(2).outcomes(cases.refused, what):
        assert not good
        assert found[0] == error, found[2]
        assert words in found[1]


def test_training_starts_from_the_first_rank(pool: Pool) -> None:
    first, second = pool(2).run(cases.start_is_the_first_ranks)
    assert all(map(torch.equal, first, second))


def test_a_compiled_step_has_room_for_the_batch_of_one_rank(pool: Pool) -> None:
    """For 100 of the 200 samples that are expected on both ranks together, and two standard deviations."""
    assert pool(2).run(cases.room) == [120, 120]


def test_a_group_of_one_trains_alone(pool: Pool) -> None:
    first, second = pool(2).run(cases.group_of_one)
    assert not torch.equal(first, second)


def test_the_log_tells_the_step(pool: Pool) -> None:
    for rank, lines in enumerate(pool(2).run(cases.logged)):
        assert lines == [f"step {step} on rank {rank} of 2" for step in (0, 1)]
