"""This module computes embeddings whose weight differs per sample, as PyTorch's documentation defines them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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


def embedding_bag(*args: Any, **kwargs: Any) -> Tensor:
    """Run ``F.embedding_bag`` with ``sparse=False``, because the gradient is added to dense gradients."""
    call = inspect.signature(F.embedding_bag).bind(*args, **kwargs)
    refuse_max_norm(call.arguments.get("max_norm"))
    call.arguments["sparse"] = False
    return F.embedding_bag(*call.args, **call.kwargs)


def dense_embedding_bag(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.embedding_bag`` or another of ATen's names of it, with ``sparse=False``."""

    def dense(*args: Any, **kwargs: Any) -> Any:
        if "sparse" in kwargs:
            kwargs["sparse"] = False
        return function(*args[:5], *[False] * (len(args) > 5), *args[6:], **kwargs)

    return dense


def refuse_max_norm(max_norm: float | None) -> None:
    """Refuse the renormalisation of embedding rows in the forward pass."""
    if max_norm is not None:
        raise NotPerSampleError(
            f"embedding with max_norm={max_norm} rewrites rows of its weight in the forward pass, without noise and "
            "for all samples at once, which is not private. Set max_norm=None, or bound the norm inside the "
            "loss: F.embedding(ids, F.normalize(weight))."
        )
