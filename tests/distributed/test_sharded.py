"""Test that ranks with shards of FSDP2 train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from tests.distributed import cases, noise_cases, refusal_cases, unusual_cases
from tests.distributed.conftest import Pool
from tests.distributed.test_noise import judged
from tests.distributed.test_replicated import largest_difference
from tests.nightly import chosen, rows

RUNS = [
    *((name, cases.shard_layers, cases.sgd) for name in cases.CASES),
    ("mlp", cases.shard_root, cases.adam),
    ("tied", cases.shard_root, cases.sgd),
]


@pytest.mark.parametrize(("name", "shard", "inner"), rows(3, RUNS))
def test_two_ranks_train_as_one_process(
    pool: Pool,
    name: str,
    shard: Callable[[nn.Module], None],
    inner: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    expected = cases.train(0, 1, name, inner)
    for found in pool(2).run(cases.train_sharded, name, shard, inner):
        assert largest_difference(found, expected) < 1e-9


def test_replicas_of_shards_train_as_one_process(pool: Pool) -> None:
    expected = cases.train(0, 1, "mlp", cases.adam)
    for found in pool(2).run(cases.train_sharded, "mlp", cases.shard_replicas, cases.adam):
        assert largest_difference(found, expected) < 1e-9


@pytest.mark.nightly
@pytest.mark.parametrize("shard", [cases.shard_layers, cases.shard_replicas])
def test_four_ranks_train_as_one_process(pool: Pool, shard: Callable[[nn.Module], None]) -> None:
    for name in ("mlp", "tied", "lora"):
        expected = cases.train(0, 1, name)
        for found in pool(4).run(cases.train_sharded, name, shard):
            assert largest_difference(found, expected) < 1e-9


def test_mixed_precision_casts_as_fsdp_does(pool: Pool) -> None:
    expected = unusual_cases.half_precision(0, 1)
    for found in pool(2).run(unusual_cases.half_precision):
        assert all(value.dtype is torch.float32 for value in found.values())
        assert largest_difference(found, expected) < 1e-6


@pytest.mark.parametrize("shard", [cases.shard_root, cases.shard_replicas])
def test_one_draw_for_each_coordinate(pool: Pool, shard: Callable[[nn.Module], None]) -> None:
    ranks = pool(2).run(noise_cases.gradients, "none", 2, shard)
    for first, second in zip(*ranks, strict=True):
        assert torch.equal(first, second)
    assert not judged(ranks[0])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("DDP", "model.module"),
        ("FSDP1", "fully_shard"),
        ("DataParallel", "one process for each device"),
        ("tensor parallel", "as tensor parallelism makes it"),
        ("tensor parallel and FSDP", "as tensor parallelism makes it"),
        ("root not sharded", "Call fully_shard on the root module too"),
        ("reduce in half precision", "clipped sums are reduced in float32"),
    ],
)
def test_refused(pool: Pool, kind: str, words: str) -> None:
    for good, error in pool(2).outcomes(refusal_cases.build, kind):
        assert not good
        assert error[0] == "ValueError", error[2]
        assert words in error[1]


def test_another_number_of_backward_calls_is_found(pool: Pool) -> None:
    for good, error in pool(2).outcomes(refusal_cases.missing_backward):
        assert not good
        assert "call is 'backward' on rank 0, but 'step' on rank 1" in error[1], error[2]


def test_only_the_layers_that_compute_are_whole(pool: Pool) -> None:
    for seen, layer, around in pool(2).run(unusual_cases.watched_memory, cases.shard_layers):
        # The root twice, six layers forward, one at a time, and backward, two at a time.
        assert len(seen) == 14, seen
        assert max(seen) == 2 * layer
        assert around == [0, 0]
    for seen, layer, around in pool(2).run(unusual_cases.watched_memory, cases.shard_root):
        assert max(seen) == 6 * layer
        assert around == [0, 0]


@pytest.mark.parametrize(
    ("shard", "compile"),
    [
        (cases.shard_root, False),
        (unusual_cases.shard_without_freeing, True),
        pytest.param(cases.shard_root, True, marks=pytest.mark.nightly),
        pytest.param(unusual_cases.shard_without_freeing, False, marks=pytest.mark.nightly),
    ],
)
def test_evaluation_sees_the_last_step_and_changes_nothing(
    pool: Pool, shard: Callable[[nn.Module], None], compile: bool
) -> None:
    """A forward pass of other code leaves modules whole, and a later step changes only their shards."""
    expected = unusual_cases.evaluated(0, 1, shard)
    for found in pool(2).run(partial(unusual_cases.evaluated, compile=compile), shard):
        assert torch.allclose(torch.cat(found), torch.cat(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "name", chosen(unusual_cases.UNUSUAL, {"checkpointed", "nonfinite", "in place"})
)
def test_unusual_models(pool: Pool, name: str) -> None:
    expected = unusual_cases.unusual(0, 1, name)
    for found in pool(2).run(unusual_cases.unusual, name):
        assert largest_difference(found, expected) < 1e-9
