"""What happens to an operation that no rule covers: it runs under ``vmap`` on per-sample copies, exactly.

A parameter's copy is an expanded leaf, so autograd itself materialises the per-sample gradient. Nothing has to be
written per operation, except where ``vmap`` deviates from the operation's own definition. Those places are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgrad.errors import NotPerSampleError


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``vmap`` forgets ``padding_idx`` when the weight differs per sample: the padding row would get a gradient."""
    refuse_max_norm(max_norm)
    if scale_grad_by_freq:
        raise NotPerSampleError(
            "embedding with scale_grad_by_freq=True and a weight that differs per sample is not supported; set "
            "scale_grad_by_freq=False."
        )
    rows = F.embedding(input, weight)
    if padding_idx is None:
        return rows
    ignored = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(ignored, rows.detach(), rows)


def refuse_max_norm(max_norm: float | None) -> None:
    """Refuse the renormalisation of embedding rows in the forward pass."""
    if max_norm is not None:
        raise NotPerSampleError(
            f"embedding with max_norm={max_norm} rewrites rows of its weight in the forward pass, without noise and "
            "for all samples at once, which is not private. Set max_norm=None, or bound the norm inside the "
            "loss: F.embedding(ids, F.normalize(weight))."
        )


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Fused kernels fail below ``vmap`` (a learned mask on CPU, alignment on CUDA); the plain formula does not."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def _register_hook(*args: Any, **kwargs: Any) -> None:
    raise NotPerSampleError(
        "the loss registers a hook on a tensor. A hook would see the gradients of all samples at once instead of one "
        "sample's. Change the value in the forward pass, or the gradients with pre_clipping_transform."
    )


CORRECTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(
    {
        F.embedding: _embedding,
        F.scaled_dot_product_attention: _attention,
        torch.Tensor.register_hook: _register_hook,
    }
)
