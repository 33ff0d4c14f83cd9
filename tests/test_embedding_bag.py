"""Embedding bags that cannot be told apart by sample, or are not private."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgrad


def _gradient(*, keep_batch_dim: bool = True, **options: Any) -> clipgrad.function.ClippedGrad:
    def loss(params: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return F.embedding_bag(batch[0], params["table"], *batch[1:], **options).sin().sum()

    return clipgrad.clipped_grad(loss, max_grad_norm=1.0, keep_batch_dim=keep_batch_dim)


TABLE = {"table": torch.arange(12.0).view(4, 3)}


def test_max_norm_is_refused() -> None:
    with pytest.raises(clipgrad.errors.NotPerSampleError, match=r"max_norm=1\.0"):
        _gradient(max_norm=1.0)(TABLE, torch.zeros(2, 5, dtype=torch.long))
    assert torch.equal(TABLE["table"], torch.arange(12.0).view(4, 3))


def test_bags_of_several_samples_end_to_end_are_refused() -> None:
    """Each sample would be one id, with an offset that belongs to the whole batch."""
    ids = torch.tensor([1, 2, 0, 3])
    with pytest.raises(clipgrad.errors.NotPerSampleError, match="2-D input"):
        _gradient()(TABLE, ids, torch.arange(4))


def test_offsets_behind_the_end_are_refused() -> None:
    with pytest.raises(clipgrad.errors.NotPerSampleError, match="5 ids of one sample"):
        _gradient(keep_batch_dim=False)(
            TABLE, torch.zeros(2, 5, dtype=torch.long), torch.tensor([[0, 6]] * 2)
        )


@pytest.mark.parametrize("options", [{"mode": "median"}, {"per_sample_weights": torch.ones(1, 5)}])
def test_what_pytorch_refuses_is_its_own_error(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        _gradient(**options)(TABLE, torch.zeros(2, 5, dtype=torch.long))
