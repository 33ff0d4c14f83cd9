"""Attention: no parameters of its own, but an operation that ``vmap`` runs badly or not at all.

The sample axis joins the batch axis, so the fused kernels see the four dimensions they were written for.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules._registry import Call, Decline, register_decomposition, register_rule


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
    """One call on ``[B * batch, heads, positions, features]``.

    A parameter among the operands (learned queries, a learned bias) takes part as its per-sample copies, so
    its gradient is exact.
    """
    if dropout_p > 0 and call.randomness != "different":
        raise Decline  # one folded call draws an own dropout mask per sample
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
    y = F.scaled_dot_product_attention(
        *(_fold(operand, lead[:-1], None if enable_gqa else lead[-1:]) for operand in (q, k, v)),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    axes = max(q.dim(), k.dim(), v.dim()) - 3
    return call.finish(y.reshape(call.batch_size, *lead[len(lead) - axes :], *y.shape[-2:]))


def _broadcast_lead(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> torch.Size:
    """The axes between samples and positions that the operands agree on; the last one is heads."""
    # With grouped queries, heads differ on purpose and those of the query stand.
    others = [(*t.shape[1:-3], 1) if enable_gqa and t.dim() > 3 else t.shape[1:-2] for t in (k, v)]
    return torch.broadcast_shapes((1,), q.shape[1:-2], *others)


def _align(tensor: Tensor, axes: int) -> Tensor:
    """Insert axes of size 1 behind the first until there are ``axes``."""
    return tensor[(slice(None), *[None] * (axes - tensor.dim()))]


def _fold(tensor: Tensor, batch: torch.Size, heads: torch.Size | None) -> Tensor:
    """``[B, ..., heads, positions, features]`` to four dimensions, samples joined with the batch axes."""
    tensor = _align(tensor, 4 + len(batch))
    heads = tensor.shape[-3:-2] if heads is None else heads
    return tensor.expand(-1, *batch, *heads, -1, -1).flatten(0, len(batch))


def _fold_mask(call: Call, attn_mask: Tensor, lead: torch.Size) -> Tensor:
    """The mask on ``[B * batch, heads, queries, keys]``, kept broadcast where every row has the same."""
    mask = call.batched(attn_mask)
    if not call.has_lanes(attn_mask) and not mask.requires_grad:
        mask = mask[:1]  # shared by all samples
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
    """Projections by ``linear``, attention by ``scaled_dot_product_attention``, which have rules.

    PyTorch's own function calls them out of the capture's sight. Arguments that it refuses are declined here,
    so that its own message is what the user reads.
    """
    if query.dim() not in (2, 3) or query.shape[-1] != embed_dim_to_check:
        raise Decline
    if embed_dim_to_check % num_heads or key.dim() != query.dim():
        raise Decline
    if (bias_k is None) != (bias_v is None) or is_causal and attn_mask is None:
        raise Decline
    unbatched = query.dim() == 2
    size = 1 if unbatched else query.shape[1]
    weights = (
        (q_proj_weight, k_proj_weight, v_proj_weight)
        if use_separate_proj_weight
        else (in_proj_weight,)
    )
    projected = _project((query, key, value), weights, in_proj_bias)
    q, k, v = (t.unsqueeze(1) if unbatched else t for t in projected)
    q = _split_heads(q, num_heads)
    k = _keys(k, static_k, bias_k, add_zero_attn, num_heads)
    v = _keys(v, static_v, bias_v, add_zero_attn, num_heads)
    # The hint replaces the mask only where the fused operation can take it.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = _additive_mask(
        None if causal else attn_mask, key_padding_mask, (size, num_heads, q.shape[2], k.shape[2]), q
    )
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        y, attention = _attend_with_weights(q, k, v, mask, dropout_p)
        attention = attention.mean(1) if average_attn_weights else attention
        attention = attention.squeeze(0) if unbatched else attention
    else:
        y, attention = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal), None
    y = y.permute(2, 0, 1, 3).flatten(2)
    y = F.linear(y.squeeze(1) if unbatched else y, out_proj_weight, out_proj_bias)
    return y, attention


def _project(
    inputs: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> list[Tensor]:
    """Query, key and value projected; equal inputs share one product of the packed weight."""
    query, key, value = inputs
    if len(weights) == 1 and weights[0] is not None:
        packed = weights[0]
        if query is key and key is value:
            return list(F.linear(query, packed, bias).chunk(3, dim=-1))
        width = query.shape[-1]
        if key is value:
            first, rest = packed.split([width, 2 * width])
            b, bs = (None, None) if bias is None else bias.split([width, 2 * width])
            return [F.linear(query, first, b), *F.linear(key, rest, bs).chunk(2, dim=-1)]
        weights = packed.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    projected = []
    for operand, weight, part in zip(inputs, weights, biases, strict=True):
        if weight is None:
            raise Decline
        projected.append(F.linear(operand, weight, part))
    return projected


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """``[positions, batch, features]`` to ``[batch, heads, positions, features per head]``."""
    return tensor.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _keys(
    projected: Tensor, static: Tensor | None, bias: Tensor | None, add_zero: bool, heads: int
) -> Tensor:
    """Keys or values by head, with the learned and the zero position appended if there are any."""
    size = projected.shape[1]
    if static is not None:
        if bias is not None or static.dim() != 3 or static.shape[0] != size * heads:
            raise Decline
        found = static.unflatten(0, (size, heads))
    else:
        if bias is not None:
            projected = torch.cat([projected, bias.expand(-1, size, -1)])
        found = _split_heads(projected, heads)
    return F.pad(found, (0, 0, 0, 1)) if add_zero else found


def _additive_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    extent: tuple[int, int, int, int],
    like: Tensor,
) -> Tensor | None:
    """Both masks as one float mask to be added to the scores; appended positions are never hidden."""
    size, heads, queries, keys = extent
    total: Tensor | None = None
    if attn_mask is not None:
        mask = _as_float(attn_mask, like, keys)
        if attn_mask.dim() == 2 and attn_mask.shape[0] == queries:
            total = mask[None, None]
        elif attn_mask.shape[:-1] == (size * heads, queries):
            total = mask.unflatten(0, (size, heads))
        else:
            raise Decline
    if key_padding_mask is not None:
        padding = _as_float(key_padding_mask, like, keys).reshape(-1, 1, 1, keys)
        if padding.shape[0] != size:
            raise Decline
        total = padding if total is None else total + padding
    return total


def _as_float(mask: Tensor, like: Tensor, keys: int) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    elif not mask.is_floating_point():
        raise Decline
    return F.pad(mask, (0, keys - mask.shape[-1]))


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention with the weights that the user asked to see."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v, weights
