"""Test compiled steps of models whose ranks hold shards of FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from clipgrad.compiled import fixed_size
from clipgrad.compiled.compiler import FEWEST_ROWS
from clipgrad.compiled.shape import recorded_sizes
from tests.distributed import cases, unusual_cases
from tests.distributed.conftest import Pool
from tests.distributed.test_replicated import largest_difference
from tests.nightly import chosen, picked

# Hugging Face's models compute positions and losses in float32, also with float64 parameters.
BOUNDS = {"gpt2": 1e-6, "llama": 1e-6, "padding mask": 1e-6}
RUNS = [
    *((name, cases.shard_layers) for name in cases.CASES),
    ("tied", cases.shard_root),
    ("mlp", cases.shard_replicas),
]


@pytest.mark.parametrize(
    ("name", "shard"), picked(RUNS, {"microbatches-shard_layers", "mlp-shard_replicas"})
)
def test_two_ranks_train_as_one_process(
    pool: Pool, name: str, shard: Callable[[nn.Module], None]
) -> None:
    """Batches of the ranks have different sizes, and some are empty."""
    expected = cases.train(0, 1, name)
    train = partial(cases.train_sharded, options={"compile": True})
    for found in pool(2).run(train, name, shard):
        assert largest_difference(found, expected) < BOUNDS.get(name, 1e-9)


@pytest.mark.nightly
def test_four_ranks_train_as_one_process(pool: Pool) -> None:
    expected = cases.train(0, 1, "lora")
    train = partial(cases.train_sharded, options={"compile": True})
    for found in pool(4).run(train, "lora", cases.shard_replicas):
        assert largest_difference(found, expected) < 1e-9


def test_mixed_precision_casts_as_fsdp_does(pool: Pool) -> None:
    # Compiled code rounds fewer intermediate values to bfloat16 than eager code does.
    expected = unusual_cases.half_precision(0, 1, compile=True)
    for found in pool(2).run(partial(unusual_cases.half_precision, compile=True)):
        assert all(value.dtype is torch.float32 for value in found.values())
        assert largest_difference(found, expected) < 1e-6


def test_all_layers_are_gathered_once_and_freed(pool: Pool) -> None:
    watched = partial(unusual_cases.watched_memory, compile=True)
    for seen, layer, around in pool(2).run(watched, cases.shard_layers):
        assert seen == [0, *(layer * count for count in range(1, 7))]
        assert around == [0, 0]


@pytest.mark.parametrize("name", ["mlp", "frozen"])
def test_a_recording_copies_what_is_gathered(pool: Pool, name: str) -> None:
    """It is not made anew, although parameters have other addresses at each batch."""
    expected = cases.train(0, 1, name)
    # Half of four samples are expected on each rank.
    sizes = [size for size in recorded_sizes(fixed_size(2)) if size >= FEWEST_ROWS]
    for found, made, replays in pool(2).run(unusual_cases.recorded, name):
        assert largest_difference(found, expected) < 1e-9
        assert made == len(sizes)
        assert replays > cases.STEPS


def test_metrics_of_a_rank_without_samples(pool: Pool) -> None:
    eager = pool(2).run(partial(unusual_cases.metrics_of_few, compile=False))
    compiled = pool(2).run(partial(unusual_cases.metrics_of_few, compile=True))
    assert [shapes for shapes, _ in compiled] == [[(7,), (5,)], [(0,), (4,)]]
    for (_, found), (_, expected) in zip(compiled, eager, strict=True):
        assert largest_difference(found, expected) < 1e-9


@pytest.mark.parametrize("name", chosen(unusual_cases.UNUSUAL, {"nonfinite"}))
def test_unusual_models(pool: Pool, name: str) -> None:
    expected = unusual_cases.unusual(0, 1, name)
    for found in pool(2).run(partial(unusual_cases.unusual, compile=True), name):
        assert largest_difference(found, expected) < BOUNDS.get(name, 1e-9)
