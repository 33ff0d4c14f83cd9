"""This module runs attention, which has no parameters, because ``vmap`` runs it slowly or not at all.

The sample axis joins the batch axis, so that the fused kernels receive the four axes that they support.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from clipgrad.rules.registry import Call, Decline, register_decomposition, register_rule

# A mask that the loss makes is fake during a trace.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


@register_rule(F.scaled_dot_product_attention, name="scaled_dot_product_attention")
def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run one call on ``[B * batch, heads, positions, features]``.

    Parameter operands (learned queries, a learned bias) enter as per-sample copies, so their gradients are exact.
    """
    if dropout_p > 0 and call.randomness != "different":
        raise Decline  # one folded call samples a separate dropout mask for each sample
    if attn_mask is not None and type(attn_mask) not in _PLAIN:
        raise Decline  # subclasses such as CausalBias bring their own implementation
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise Decline
    mask_axes = 0 if attn_mask is None else attn_mask.dim()
    if mask_axes > max(query.dim(), key.dim(), value.dim()):
        raise Decline
    q, k, v = (call.batched(operand) for operand in (query, key, value))
    lead = _broadcast_lead(q, k, v, enable_gqa)
    mask = None if attn_mask is None else _fold_mask(call, attn_mask, lead)
    # PyTorch has no fused attention for such a mask, which transformers makes for images.
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    heads = None if enable_gqa else lead[-1:]
    y = F.scaled_dot_product_attention(
        _fold(q, lead[:-1], heads),
        _fold(k, lead[:-1], heads),
        _fold(v, lead[:-1], heads),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    axes = max(q.dim(), k.dim(), v.dim()) - 3
    return call.finish(y.reshape(call.batch_size, *lead[len(lead) - axes :], *y.shape[-2:]))


def _broadcast_lead(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> torch.Size:
    """Return the broadcast axes between samples and positions; the last axis is heads."""
    # With grouped queries the numbers of heads differ, and the query's number is the result.
    others = [(*t.shape[1:-3], 1) if enable_gqa and t.dim() > 3 else t.shape[1:-2] for t in (k, v)]
    return torch.Size(torch.broadcast_shapes((1,), q.shape[1:-2], *others))


def _align(tensor: Tensor, axes: int) -> Tensor:
    """Insert axes of size 1 after the first axis until there are ``axes``."""
    return tensor[(slice(None), *[None] * (axes - tensor.dim()))]


def _fold(tensor: Tensor, batch: torch.Size, heads: torch.Size | None) -> Tensor:
    """Reshape ``[B, ..., heads, positions, features]`` to four axes; the sample axis joins the batch axes."""
    tensor = _align(tensor, 4 + len(batch))
    heads = tensor.shape[-3:-2] if heads is None else heads
    return tensor.expand(-1, *batch, *heads, -1, -1).flatten(0, len(batch))


def _fold_mask(call: Call, attn_mask: Tensor, lead: torch.Size) -> Tensor:
    """Return the mask for ``[B * batch, heads, queries, keys]``; a shared mask is not expanded."""
    mask = call.batched(attn_mask)
    if not call.has_batch_axis(attn_mask) and not mask.requires_grad:
        mask = mask[:1]
    while mask.dim() < 3:
        mask = mask.unsqueeze(1)
    mask = _align(mask, 3 + len(lead))
    batch = mask.shape[1:-3]
    if mask.shape[0] == 1 and prod(batch) == 1:
        return mask.flatten(0, len(batch))
    return mask.expand(call.batch_size, *lead[:-1], -1, -1, -1).flatten(0, len(batch))


def _run_inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function of ``torch.nn.functional`` whose operations the capture intercepts one by one.

    The function itself first asks whether a mode overrides it, and would never come to its own operations.
    """
    names = {**function.__globals__, "has_torch_function": lambda operands: False}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


# Its projections run by ``linear`` and its attention by ``scaled_dot_product_attention``, which both have rules.
multi_head_attention = register_decomposition(
    F.multi_head_attention_forward, name="multi_head_attention"
)(_run_inside(F.multi_head_attention_forward))
