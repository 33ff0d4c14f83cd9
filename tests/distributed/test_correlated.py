"""Correlated noise of several ranks: each coordinate follows from its own past, and from nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipgrad.factorisation.toeplitz import column_norm, square_root
from tests.distributed import cases, correlated_cases
from tests.distributed.conftest import Pool
from tests.distributed.correlated_cases import BANDS, STEPS, Wrap
from tests.distributed.test_noise import judged
from tests.factorisation.oracle import matrix

COLUMN = square_root(BANDS)


def undone(found: Tensor) -> list[Tensor]:
    """What a reader of all steps has: independent noise of variance one in each step."""
    return list(torch.from_numpy(matrix(COLUMN, STEPS)) @ even(found) / column_norm(COLUMN))


def even(found: Tensor) -> Tensor:
    """Without the last value, so that a step has two halves of one size."""
    return found[:, : found.shape[1] // 2 * 2]


KINDS = [
    (2, None),
    (2, cases.shard_layers),
    pytest.param(4, None, marks=pytest.mark.nightly),
    pytest.param(4, cases.shard_replicas, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("ranks", "wrap"), KINDS)
def test_each_coordinate_follows_from_its_own_past(pool: Pool, ranks: int, wrap: Wrap) -> None:
    found = pool(ranks).run(correlated_cases.whole_run, wrap)
    noise, _, epsilon = found[0]
    for other, _, same in found:
        assert torch.equal(noise, other)
        assert epsilon == same
    assert not judged(undone(noise))
    assert judged(list(even(noise) / column_norm(COLUMN)))  # independent noise would be noticed
    # A rank keeps the rows of its share alone, and some values that fill up a bucket.
    share = (BANDS - 1) * noise.shape[1] / ranks
    assert all(0.8 * share < kept < 1.2 * share for _, kept, _ in found)


@pytest.mark.parametrize(("ranks", "wrap"), KINDS)
def test_each_rank_goes_on_from_its_own_file(
    pool: Pool, ranks: int, wrap: Wrap, tmp_path: Path
) -> None:
    first, *others = pool(ranks).run(correlated_cases.stopped, str(tmp_path), wrap)
    assert all(torch.equal(first, other) for other in others)
    assert not judged(undone(first))


@pytest.mark.parametrize("wrap", [None, cases.shard_layers])
def test_files_of_other_ranks_are_refused(pool: Pool, wrap: Wrap, tmp_path: Path) -> None:
    pool(2).run(correlated_cases.stopped, str(tmp_path), wrap)
    pool(2).run(correlated_cases.go_on, str(tmp_path), 0, wrap)
    for good, error in pool(2).outcomes(correlated_cases.go_on, str(tmp_path), 1, wrap):
        assert not good
        assert "each continues the checkpoint that it wrote itself" in error[1], error[2]
    ((good, error),) = pool(1).outcomes(correlated_cases.go_on, str(tmp_path), 0, wrap)
    assert not good
    assert "the data, the plan and the number of processes of the saved sampler" in error[1], error[
        2
    ]
