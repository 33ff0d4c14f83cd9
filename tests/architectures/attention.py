"""Attention: the library's modules in all their modes, and attention written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, floats, freeze, normal, padding, several


def _causal(length: int, like: Tensor, *, boolean: bool = False) -> Tensor:
    if boolean:
        return torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on one sequence, which a linear layer prepares."""

    def __init__(
        self,
        *,
        need_weights: bool = False,
        causal: bool = False,
        average: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
        self.before = nn.Linear(4, 4)
        self.need_weights, self.causal, self.average = need_weights, causal, average

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.before(x)
        if not self.inner.batch_first:
            x = x.transpose(0, 1)
        out, weights = self.inner(
            x,
            x,
            x,
            key_padding_mask=padding,
            need_weights=self.need_weights,
            average_attn_weights=self.average,
            attn_mask=_causal(5, x, boolean=padding is not None) if self.causal else None,
        )
        if not self.inner.batch_first:
            out = out.transpose(0, 1)
        return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], dim=1)


SEQUENCE, PADDED = floats(5, 4), several(floats(5, 4), padding)
add("mha_self", SelfAttention, SEQUENCE, "packed projection, no weights returned")
add(
    "mha_self_weights",
    lambda: SelfAttention(need_weights=True),
    SEQUENCE,
    "averaged weights returned",
)
add(
    "mha_self_head_weights",
    lambda: SelfAttention(need_weights=True, average=False),
    SEQUENCE,
    "weights of every head returned",
)
add(
    "mha_time_first", lambda: SelfAttention(batch_first=False), SEQUENCE, "the batch axis is second"
)
add("mha_no_bias", lambda: SelfAttention(bias=False), SEQUENCE, "no bias in any projection")
add("mha_causal", lambda: SelfAttention(causal=True), SEQUENCE, "a float attention mask")
add("mha_padding", SelfAttention, PADDED, "a padding mask that differs between samples")
add(
    "mha_padding_causal_weights",
    lambda: SelfAttention(causal=True, need_weights=True),
    PADDED,
    "both masks at once, weights returned",
)
add(
    "mha_bias_kv",
    lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True),
    PADDED,
    "learned extra key and value, and a zero key",
)
add(
    "mha_frozen_output",
    SelfAttention,
    SEQUENCE,
    "one projection frozen, the packed one trained",
    trainable=freeze("inner.out_proj"),
)


class CrossAttention(nn.Module):
    """nn.MultiheadAttention between two sequences of different length and width."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.memory = nn.Linear(3, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.memory(memory)
        out, _ = self.inner(x, memory, memory, need_weights=False)
        return out


CROSS = several(floats(3, 4), floats(5, 3))
add("mha_cross", lambda: CrossAttention(4), CROSS, "one packed weight, queries projected apart")
add(
    "mha_cross_own_widths", lambda: CrossAttention(6, kdim=6, vdim=6), CROSS, "separate projections"
)


@architecture("mha_learned_queries", floats(5, 4))
class LearnedQueries(nn.Module):
    """Perceiver: the queries are a parameter expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.inner = normal(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        return self.inner(latents, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """nn.TransformerEncoder with masks."""

    def __init__(self, layers: int, *, causal: bool = False, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **options)
        self.inner = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.causal = causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = _causal(5, x) if self.causal else None
        return self.inner(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)


add("transformer_encoder", lambda: Encoder(2), SEQUENCE, "norm after attention")
add(
    "transformer_encoder_norm_first",
    lambda: Encoder(1, norm_first=True, activation=F.gelu),
    PADDED,
    "norm before attention, padding mask",
)
add(
    "transformer_encoder_causal",
    lambda: Encoder(1, causal=True, bias=False),
    SEQUENCE,
    "causal mask, no biases",
)
add("transformer_encoder_eval", lambda: Encoder(1).eval(), SEQUENCE, "trained in eval mode")


@architecture("transformer_encoder_frozen_eval", SEQUENCE, trainable=freeze("encoder"))
class FrozenEncoder(nn.Module):
    """A frozen encoder in eval mode may take the library's fused inference path."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(1).eval(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Decoder(nn.Module):
    """nn.TransformerDecoderLayer: causal self-attention, then attention to a memory."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **options)
        self.memory = nn.Linear(3, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.inner(x, self.memory(memory), tgt_mask=_causal(3, x), tgt_is_causal=True)


add("transformer_decoder", Decoder, CROSS, "norm after attention")
add(
    "transformer_decoder_norm_first",
    lambda: Decoder(norm_first=True),
    CROSS,
    "norm before attention",
)
