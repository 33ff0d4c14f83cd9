"""This module has the rule for embeddings, which select rows of a table by ids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules.canonical import Outer
from clipgrad.rules.embedding_definition import refuse_max_norm
from clipgrad.rules.names import functional_aten_names_of
from clipgrad.rules.one_hot import OneHot
from clipgrad.rules.registry import Call, Extent, Recipe, register_rule


@register_rule(F.embedding, name="embedding")
def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Run an embedding as a linear map of one-hot inputs, which are stored as ids.

    All samples may share their ids (position ids). ``sparse`` is ignored, because clipped sums are dense.
    """
    refuse_max_norm(max_norm)
    w = call.shared(weight)
    ids = call.batched(input)
    y = F.embedding(ids if call.has_batch_axis(input) else input, w, padding_idx)
    if not call.has_batch_axis(input):
        y = y.expand(call.batch_size, *y.shape)
    flat = ids.flatten(1).long() if ids.dim() > 1 else ids[:, None].long()

    def make(gradient: Tensor) -> Outer:
        rows = gradient.reshape(*flat.shape, w.shape[1])
        if padding_idx is not None:
            ignored = flat == padding_idx % w.shape[0]
            rows = rows.masked_fill(ignored[..., None], 0)
        if scale_grad_by_freq:
            count = (flat[:, :, None] == flat[:, None, :]).sum(-1, keepdim=True)
            rows = rows / count
        return Outer(OneHot(flat, w.shape[0]), rows, w.shape)

    extent = Extent(flat.shape[1], w.shape[0], w.shape[1], one_hot=True)
    return call.finish(y, Recipe(weight, make, extent), saved=(ids,))


@register_rule(torch.embedding, *functional_aten_names_of("embedding"), name="embedding")
def aten_embedding(
    call: Call,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Run ``embedding`` with arguments in ATen's order; a negative ``padding_idx`` means none."""
    padding = None if padding_idx < 0 else padding_idx
    return embedding(call, indices, weight, padding, None, 2.0, scale_grad_by_freq)
