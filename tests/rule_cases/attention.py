"""Every way to call the attention operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
DOUBLE = torch.float64
HEADS, FEATURES, QUERIES, KEYS = 2, 4, 3, 5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def score(output: Tensor) -> Tensor:
    """A scalar whose gradient differs from element to element."""
    return (output * torch.linspace(-1, 1, output.numel(), dtype=DOUBLE).view_as(output)).sum()


# ---------------------------------------------------------------- scaled_dot_product_attention


def _attention(
    name: str,
    *,
    query: tuple[int, ...] = (HEADS, QUERIES, FEATURES),
    key: tuple[int, ...] = (HEADS, KEYS, FEATURES),
    value: tuple[int, ...] = (HEADS, KEYS, FEATURES),
    params: Callable[[], Params] = dict,
    batch: Callable[[int], tuple[Tensor, ...]] = lambda size: (),
    options: Callable[..., dict[str, Any]] = lambda p, *more: {},
) -> RuleCase:
    """Query, key and value are data times a learned vector, unless the parameters bring their own."""
    shapes = {"query": query, "key": key, "value": value}

    def make_params() -> Params:
        own = params()
        return own if set(shapes) <= set(own) else {"gain": draw(FEATURES), **own}

    def make_batch(size: int) -> tuple[Tensor, ...]:
        return (*(draw(size, *shape) for shape in shapes.values()), *batch(size))

    def loss(p: Params, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        operands = [
            p[name] if name in p else data * p["gain"][: data.shape[-1]]
            for name, data in zip(shapes, (q, k, v), strict=True)
        ]
        # Times the data, so that samples differ even where every operand is learned.
        return score(F.scaled_dot_product_attention(*operands, **options(p, *more))) * q.mean()

    return RuleCase("scaled_dot_product_attention", name, loss, make_params, make_batch)


def _bool_mask(*shape: int) -> Tensor:
    """Half hidden; the first key stays visible to every query."""
    mask = torch.rand(*shape) < 0.5
    mask[..., 0] = True
    return mask


SHARED_BOOL = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
SHARED_FLOAT = torch.linspace(-2, 1, QUERIES * KEYS, dtype=DOUBLE).view(QUERIES, KEYS)

ATTENTION = [
    _attention("batch_of_one"),
    _attention("scale", options=lambda p: {"scale": 0.3}),
    _attention("causal", key=(HEADS, QUERIES, FEATURES), value=(HEADS, QUERIES, FEATURES),
               options=lambda p: {"is_causal": True}),
    _attention("no_heads", query=(QUERIES, FEATURES), key=(KEYS, FEATURES), value=(KEYS, FEATURES)),
    _attention("more_batch_axes", query=(3, HEADS, QUERIES, FEATURES),
               key=(3, HEADS, KEYS, FEATURES), value=(3, HEADS, KEYS, FEATURES)),
    _attention("more_batch_axes_shared_mask", query=(3, HEADS, QUERIES, FEATURES),
               key=(3, HEADS, KEYS, FEATURES), value=(3, HEADS, KEYS, FEATURES),
               options=lambda p: {"attn_mask": SHARED_FLOAT.expand(3, 1, -1, -1)}),
    _attention("more_batch_axes_mask", query=(3, HEADS, QUERIES, FEATURES),
               key=(3, HEADS, KEYS, FEATURES), value=(3, HEADS, KEYS, FEATURES),
               batch=lambda size: (_bool_mask(size, 3, 1, QUERIES, KEYS),),
               options=lambda p, mask: {"attn_mask": mask}),
    _attention("grouped_queries", query=(4, QUERIES, FEATURES), options=lambda p: {"enable_gqa": True}),
    _attention("grouped_queries_one_key_head", query=(4, QUERIES, FEATURES),
               key=(1, KEYS, FEATURES), value=(1, KEYS, FEATURES),
               options=lambda p: {"enable_gqa": True}),
    _attention("value_features", value=(HEADS, KEYS, 3)),
    _attention("shared_bool_mask", options=lambda p: {"attn_mask": SHARED_BOOL}),
    _attention("shared_float_mask", options=lambda p: {"attn_mask": SHARED_FLOAT}),
    _attention("shared_mask_of_heads",
               options=lambda p: {"attn_mask": torch.stack([SHARED_FLOAT, -SHARED_FLOAT])}),
    _attention("bool_mask_per_sample", batch=lambda size: (_bool_mask(size, 1, QUERIES, KEYS),),
               options=lambda p, mask: {"attn_mask": mask}),
    _attention("padding_mask_per_sample", batch=lambda size: (_bool_mask(size, 1, 1, KEYS),),
               options=lambda p, mask: {"attn_mask": mask}),
    _attention("float_mask_per_sample", batch=lambda size: (draw(size, HEADS, QUERIES, KEYS),),
               options=lambda p, mask: {"attn_mask": mask}),
    _attention("mask_without_heads_per_sample", batch=lambda size: (draw(size, QUERIES, KEYS),),
               options=lambda p, mask: {"attn_mask": mask[0]}),
    _attention("learned_bias", params=lambda: {"bias": draw(HEADS, QUERIES, KEYS)},
               options=lambda p: {"attn_mask": p["bias"]}),
    _attention("learned_bias_of_all_heads", params=lambda: {"bias": draw(1, 1, 1, KEYS)},
               options=lambda p: {"attn_mask": p["bias"]}),
    _attention("relative_positions", params=lambda: {"table": draw(QUERIES + KEYS, HEADS)},
               options=lambda p: {"attn_mask": F.embedding(
                   torch.arange(QUERIES)[:, None] + torch.arange(KEYS), p["table"]
               ).permute(2, 0, 1)[None]}),
    _attention("learned_queries", params=lambda: {"query": draw(1, HEADS, QUERIES, FEATURES)}),
    _attention("learned_keys_and_values", params=lambda: {
        "key": draw(HEADS, KEYS, FEATURES), "value": draw(1, HEADS, KEYS, FEATURES)}),
    _attention("all_learned", params=lambda: {
        "query": draw(1, HEADS, QUERIES, FEATURES), "key": draw(1, HEADS, KEYS, FEATURES),
        "value": draw(1, HEADS, KEYS, FEATURES)}),
]  # fmt: skip


# ------------------------------------------------------------------ multi_head_attention_forward


def mha_params(
    *,
    features: int = 4,
    key_features: int | None = None,
    bias: bool = True,
    bias_kv: bool = False,
) -> Params:
    """Parameters as ``nn.MultiheadAttention`` names them; separate weights if keys differ in width."""
    params = {"out_weight": draw(features, features)}
    if key_features is None:
        params["in_weight"] = draw(3 * features, features)
    else:
        params["q_weight"] = draw(features, features)
        params["k_weight"] = draw(features, key_features)
        params["v_weight"] = draw(features, key_features + 1)
    if bias:
        params.update(in_bias=draw(3 * features), out_bias=draw(features))
    if bias_kv:
        params.update(bias_k=draw(1, 1, features), bias_v=draw(1, 1, features))
    return params


def mha(
    p: Params, q: Tensor, k: Tensor, v: Tensor, *, heads: int = HEADS, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The functional form, on ``[positions, batch, features]``."""
    options.setdefault("need_weights", False)
    return F.multi_head_attention_forward(
        q, k, v, q.shape[-1], heads, p.get("in_weight"), p.get("in_bias"), p.get("bias_k"),
        p.get("bias_v"), options.pop("add_zero_attn", False), 0.0, p["out_weight"],
        p.get("out_bias"), use_separate_proj_weight="in_weight" not in p,
        q_proj_weight=p.get("q_weight"), k_proj_weight=p.get("k_weight"),
        v_proj_weight=p.get("v_weight"), **options,
    )  # fmt: skip


def _mha(
    name: str,
    inputs: str,
    *,
    params: Callable[[], Params] = mha_params,
    batch: Callable[[int], tuple[Tensor, ...]] = lambda size: (),
    options: Callable[..., dict[str, Any]] = lambda *more: {},
) -> RuleCase:
    """``inputs`` is self (all equal), memory (key is value), other (all differ) or wide."""

    def make_batch(size: int) -> tuple[Tensor, ...]:
        widths = (4, 3, 4) if inputs == "wide" else (4, 4, 4)
        lengths = (QUERIES, KEYS, KEYS)
        data = [draw(size, s, w) for s, w in zip(lengths, widths, strict=True)]
        return (*data, *batch(size))

    def loss(p: Params, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        if inputs == "self":
            k = v = q
        if inputs == "memory":
            v = k
        y, weights = mha(p, q, k, v, **options(*more))
        return score(y) if weights is None else score(y) + score(weights)

    return RuleCase("multi_head_attention", name, loss, params, make_batch)


def _unbatched_loss(p: Params, x: Tensor) -> Tensor:
    y, weights = mha(p, x[0], x[0], x[0], need_weights=True)
    assert weights is not None
    return score(y) + score(weights)


def _static(size: int) -> tuple[Tensor, Tensor]:
    return draw(size, HEADS, KEYS, 2), draw(size, HEADS, KEYS, 2)


SQUARE = torch.full((QUERIES, QUERIES), float("-inf"), dtype=DOUBLE).triu(1)
MULTI_HEAD = [
    _mha("self", "self"),
    _mha("self_weights", "self", options=lambda: {"need_weights": True}),
    _mha("self_weights_per_head", "self",
         options=lambda: {"need_weights": True, "average_attn_weights": False}),
    _mha("no_bias", "self", params=lambda: mha_params(bias=False)),
    _mha("memory", "memory"),
    _mha("memory_no_bias", "memory", params=lambda: mha_params(bias=False)),
    _mha("other", "other"),
    _mha("separate_weights", "wide", params=lambda: mha_params(key_features=3)),
    _mha("separate_weights_no_bias", "wide", params=lambda: mha_params(key_features=3, bias=False)),
    _mha("bias_kv", "self", params=lambda: mha_params(bias_kv=True)),
    _mha("bias_kv_mask", "memory", params=lambda: mha_params(bias_kv=True),
         options=lambda: {"attn_mask": SHARED_FLOAT}),
    _mha("zero_attention", "memory", options=lambda: {"add_zero_attn": True}),
    _mha("everything_appended", "memory", params=lambda: mha_params(bias_kv=True),
         batch=lambda size: (_bool_mask(size, KEYS).logical_not(),),
         options=lambda mask: {"add_zero_attn": True, "key_padding_mask": mask,
                               "attn_mask": ~SHARED_BOOL, "need_weights": True}),
    _mha("causal_hint", "self", options=lambda: {"attn_mask": SQUARE, "is_causal": True}),
    _mha("causal_hint_weights", "self",
         options=lambda: {"attn_mask": SQUARE, "is_causal": True, "need_weights": True}),
    _mha("bool_mask", "memory", options=lambda: {"attn_mask": ~SHARED_BOOL}),
    _mha("mask_of_heads", "memory", batch=lambda size: (draw(size, HEADS, QUERIES, KEYS),),
         options=lambda mask: {"attn_mask": mask[0]}),
    _mha("padding", "memory", batch=lambda size: (_bool_mask(size, KEYS).logical_not(),),
         options=lambda mask: {"key_padding_mask": mask}),
    _mha("float_padding", "memory", batch=lambda size: (draw(size, KEYS),),
         options=lambda mask: {"key_padding_mask": mask}),
    _mha("static_keys", "memory", batch=_static,
         options=lambda k, v: {"static_k": k[0], "static_v": v[0]}),
    RuleCase("multi_head_attention", "unbatched", _unbatched_loss, mha_params,
             lambda size: (draw(size, QUERIES, 4),)),
]  # fmt: skip

CASES: list[RuleCase] = ATTENTION + MULTI_HEAD
