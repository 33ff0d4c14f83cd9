"""This module computes embeddings whose weight differs per sample, as PyTorch's documentation defines them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.errors import NotPerSampleError


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows; ``vmap`` ignores ``padding_idx`` and ``scale_grad_by_freq`` when the weight differs per sample."""
    refuse_max_norm(max_norm)
    rows = F.embedding(input, weight)
    if scale_grad_by_freq:
        count = (input.reshape(-1, 1) == input.reshape(1, -1)).sum(1).view(input.shape)
        fixed = rows.detach()
        rows = fixed + (rows - fixed) / count.unsqueeze(-1)  # same value, smaller gradient
    if padding_idx is None:
        return rows
    ignored = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(ignored, rows.detach(), rows)


def aten_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows with arguments in ATen's order; a negative ``padding_idx`` means none."""
    padding = None if padding_idx < 0 else padding_idx
    return embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Run ``F.embedding_bag`` with ``sparse=False``, because the gradient is added to dense gradients."""
    refuse_max_norm(max_norm)
    return F.embedding_bag(
        input,
        weight,
        offsets,
        scale_grad_by_freq=scale_grad_by_freq,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


def aten_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    """Run ``torch.embedding_bag`` with ATen's arguments and results, and with ``sparse=False``."""
    return torch.embedding_bag(
        weight,
        indices,
        offsets,
        scale_grad_by_freq,
        mode,
        False,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )


def private_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, ...]:
    """Run ``torch._embedding_bag``, where a negative ``padding_idx`` means none and does not count from the end."""
    return aten_embedding_bag(
        weight, indices, offsets, scale_grad_by_freq, mode, False, per_sample_weights, include_last_offset,
        None if padding_idx < 0 else padding_idx,
    )  # fmt: skip


def refuse_max_norm(max_norm: float | None) -> None:
    """Refuse the renormalisation of embedding rows in the forward pass."""
    if max_norm is not None:
        raise NotPerSampleError(
            f"embedding with max_norm={max_norm} rewrites rows of its weight in the forward pass, without noise and "
            "for all samples at once, which is not private. Set max_norm=None, or bound the norm inside the "
            "loss: F.embedding(ids, F.normalize(weight))."
        )
