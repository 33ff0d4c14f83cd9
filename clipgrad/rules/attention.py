"""This module runs attention, which has no parameters, because ``vmap`` runs it slowly or not at all.

The sample axis joins the batch axis, so that the fused kernels receive the four axes that they support.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules.registry import Call, Decline, register_decomposition, register_rule


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
    if attn_mask is not None and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        raise Decline  # subclasses such as CausalBias bring their own implementation
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise Decline
    mask_axes = 0 if attn_mask is None else attn_mask.dim()
    if mask_axes > max(query.dim(), key.dim(), value.dim()):
        raise Decline
    q, k, v = (call.batched(operand) for operand in (query, key, value))
    lead = _broadcast_lead(q, k, v, enable_gqa)
    mask = None if attn_mask is None else _fold_mask(call, attn_mask, lead)
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


@register_decomposition(F.multi_head_attention_forward, name="multi_head_attention")
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run projections by ``linear`` and attention by ``scaled_dot_product_attention``, which both have rules.

    The capture cannot intercept these calls inside PyTorch's function. Arguments that PyTorch refuses are declined.
    """
    _decline_what_is_refused(query, key, embed_dim_to_check, num_heads)
    if (bias_k is None) != (bias_v is None) or (is_causal and attn_mask is None):
        raise Decline
    if bias_k is not None and bias_v is not None and (bias_k.dim(), bias_v.dim()) != (3, 3):
        raise Decline  # PyTorch repeats a bias with fewer axes
    inputs = (query, key, value)
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        projected = _project(inputs, weights, in_proj_bias)
    else:
        projected = _project_packed(inputs, in_proj_weight, in_proj_bias)
    q, k, v = (_with_batch(t) for t in projected)
    q = _split_heads(q, num_heads)
    k = _keys(k, static_k, bias_k, add_zero_attn, num_heads)
    v = _keys(v, static_v, bias_v, add_zero_attn, num_heads)
    # ``is_causal`` replaces the mask only where the fused operation supports it.
    causal = is_causal and key_padding_mask is None and not need_weights
    appended = (bias_k is not None) + add_zero_attn
    mask = _additive_mask(None if causal else attn_mask, key_padding_mask, q, k, appended)
    y, seen = _attend(q, k, v, mask, dropout_p if training else 0.0, causal, need_weights)
    y = y.permute(2, 0, 1, 3).reshape(query.shape)
    if seen is not None:
        seen = seen.mean(1) if average_attn_weights else seen
        seen = seen.squeeze(0) if query.dim() == 2 else seen
    return F.linear(y, out_proj_weight, out_proj_bias), seen


def _decline_what_is_refused(query: Tensor, key: Tensor, features: int, heads: int) -> None:
    if query.dim() not in (2, 3) or query.shape[-1] != features:
        raise Decline
    if features % heads or key.dim() != query.dim():
        raise Decline


def _with_batch(tensor: Tensor) -> Tensor:
    """Return ``[positions, batch, features]``; an unbatched tensor gets a batch axis of size 1."""
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)


def _project_packed(
    inputs: tuple[Tensor, Tensor, Tensor], packed: Tensor | None, bias: Tensor | None
) -> Sequence[Tensor]:
    """Project query, key and value; identical inputs share one product with the packed weight."""
    if packed is None:
        raise Decline
    query, key, value = inputs
    if query is key and key is value:
        return F.linear(query, packed, bias).chunk(3, dim=-1)
    if key is not value:
        return _project(inputs, packed.chunk(3), bias)
    sizes = [query.shape[-1], 2 * query.shape[-1]]
    first, rest = packed.split(sizes)
    b, bs = (None, None) if bias is None else bias.split(sizes)
    return [F.linear(query, first, b), *F.linear(key, rest, bs).chunk(2, dim=-1)]


def _project(
    inputs: tuple[Tensor, Tensor, Tensor], weights: Sequence[Tensor | None], bias: Tensor | None
) -> Sequence[Tensor]:
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    projected = []
    for operand, weight, part in zip(inputs, weights, biases, strict=True):
        if weight is None:
            raise Decline
        projected.append(F.linear(operand, weight, part))
    return projected


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """Reshape ``[positions, batch, features]`` to ``[batch, heads, positions, features per head]``."""
    by_head = tensor.reshape(*tensor.shape[:2], heads, tensor.shape[2] // heads)
    return by_head.permute(1, 2, 0, 3)


def _keys(
    projected: Tensor, static: Tensor | None, bias: Tensor | None, add_zero: bool, heads: int
) -> Tensor:
    """Return keys or values by head, and append the learned and the zero position if present."""
    size = projected.shape[1]
    if static is not None:
        if bias is not None or static.dim() != 3 or static.shape[0] != size * heads:
            raise Decline
        found = static.view(size, heads, *static.shape[1:])
    else:
        if bias is not None:
            projected = torch.cat([projected, bias.repeat(1, size, 1)])
        found = _split_heads(projected, heads)
    return F.pad(found, (0, 0, 0, 1)) if add_zero else found


def _additive_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, appended: int
) -> Tensor | None:
    """Combine both masks into one that is added to the scores; appended positions are never masked."""
    size, heads, queries, keys = *q.shape[:3], k.shape[2]
    total: Tensor | None = None
    if attn_mask is not None:
        mask = _as_float(attn_mask, q, keys - appended, appended)
        if mask.shape == (queries, keys):
            total = mask[None, None]
        elif mask.shape == (size * heads, queries, keys):
            total = mask.unflatten(0, (size, heads))
        else:
            raise Decline
    if key_padding_mask is not None:
        padding = _as_float(key_padding_mask, q, keys - appended, appended).reshape(-1, 1, 1, keys)
        if padding.shape[0] != size:
            raise Decline
        total = padding if total is None else total + padding
    return total


def _as_float(mask: Tensor, like: Tensor, keys: int, appended: int) -> Tensor:
    if mask.shape[-1] != keys:
        raise Decline
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    elif not mask.is_floating_point():
        raise Decline
    return F.pad(mask, (0, appended)) if appended else mask


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal), None
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v, weights
