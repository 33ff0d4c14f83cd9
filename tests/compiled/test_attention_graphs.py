"""A compiled step runs PyTorch's fused attention wherever the eager step does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiled.test_replay import graph_of

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
POSITIONS = 2


def attention(x: Tensor, mask: Tensor | None) -> Tensor:
    heads = x[:, None, None].expand(-1, 1, POSITIONS, -1)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).sum()


def ones(x: Tensor) -> Tensor:
    """As in ``transformers``, which makes such a mask inside the loss for images."""
    allowed = torch.arange(POSITIONS)[:, None] >= 0
    return allowed.expand(1, 1, POSITIONS, POSITIONS)


def upper_rows(x: Tensor) -> Tensor:
    return torch.zeros(POSITIONS, POSITIONS).masked_fill(
        torch.ones(POSITIONS, POSITIONS).triu(1) > 0, -torch.inf
    )


def of_the_sample(x: Tensor) -> Tensor:
    return (x[:, None, None, :POSITIONS] < 2).expand(-1, 1, POSITIONS, POSITIONS)


@pytest.mark.parametrize("mask", [lambda x: None, ones, upper_rows, of_the_sample])
def test_a_mask_that_the_loss_makes_leaves_attention_fused(
    mask: Callable[[Tensor], Tensor | None],
) -> None:
    step = graph_of(lambda w, x: attention(w * x, mask(x)))
    operations = [node.target for node in step.module.graph.nodes if node.op == "call_function"]
    assert operations.count(FUSED) == 1
    assert torch.ops.aten.bmm.default not in operations
