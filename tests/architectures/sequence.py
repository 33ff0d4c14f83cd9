"""Attention and state-space layers as language models write them by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, floats, normal, padding, several

SEQUENCE, PADDED = floats(5, 4), several(floats(5, 4), padding)


class HandWritten(nn.Module):
    """A language model's attention: rotary positions, fused or plain, shared heads."""

    def __init__(self, heads: int, shared: int, mode: str) -> None:
        super().__init__()
        self.heads, self.shared, self.mode = heads, shared, mode
        self.query, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.key, self.value = (nn.Linear(4, 4 * shared // heads) for _ in range(2))

    def _rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)[:, None]
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                first * angles.sin() + second * angles.cos(),
            ],
            dim=-1,
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        if self.mode == "gqa":
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
        key = key.repeat_interleave(self.heads // self.shared, dim=1)
        value = value.repeat_interleave(self.heads // self.shared, dim=1)
        if self.mode == "causal":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.7)
        steps = torch.arange(query.shape[2], device=query.device)
        visible = steps[:, None] >= steps
        if padding is not None:
            visible = visible & ~padding[:, None, None, :]
        if self.mode == "mask":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        scores = (query @ key.mT / 2**0.5).masked_fill(~visible, torch.finfo(query.dtype).min)
        return scores.softmax(-1) @ value

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.key(x).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        mixed = self._attend(self._rotate(query), self._rotate(key), value, padding)
        return self.out(mixed.transpose(1, 2).flatten(2))


add(
    "sdpa_causal",
    lambda: HandWritten(2, 2, "causal"),
    SEQUENCE,
    "fused attention, causal flag, scale",
)
add(
    "sdpa_mask",
    lambda: HandWritten(2, 2, "mask"),
    PADDED,
    "fused attention, boolean mask per sample",
)
add(
    "sdpa_grouped_query",
    lambda: HandWritten(2, 1, "gqa"),
    SEQUENCE,
    "key heads shared by enable_gqa",
)
add("grouped_query_repeat", lambda: HandWritten(2, 1, "mask"), PADDED, "key heads repeated by hand")
add("attention_by_hand", lambda: HandWritten(2, 2, "plain"), PADDED, "matmul, softmax, matmul")


@architecture("sdpa_without_heads", SEQUENCE)
class SingleHead(nn.Module):
    """Fused attention on three-dimensional operands, and with a learned float mask."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.bias = nn.Linear(4, 12), normal(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.packed(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)


@architecture("linear_attention", SEQUENCE)
class LinearAttention(nn.Module):
    """Causal attention without a softmax: cumulative sums of outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.decay = nn.Linear(4, 12, bias=False), normal(5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = F.elu(self.packed(x)).add(1).chunk(3, dim=-1)
        states = (self.decay[:, None, None] * key.unsqueeze(-1) * value.unsqueeze(-2)).cumsum(1)
        return (query.unsqueeze(-2) @ states).squeeze(-2)


@architecture("selective_scan", SEQUENCE)
class SelectiveScan(nn.Module):
    """A state-space layer (Mamba): data-dependent steps, a parameter in an exponential, a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate, self.skip = normal(4, 3), normal(4)
        self.project, self.step = nn.Linear(4, 6, bias=False), nn.Linear(4, 4)
        self.local = nn.Conv1d(4, 4, 2, groups=4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.local(x.mT)[..., :-1]).mT
        write, read = self.project(x).chunk(2, dim=-1)
        width = F.softplus(self.step(x)).unsqueeze(-1)
        keep = torch.exp(-width * self.log_rate.exp())
        state, outputs = torch.zeros_like(keep[:, 0]), []
        for now in range(x.shape[1]):
            state = (
                keep[:, now] * state + (width[:, now] * x[:, now, :, None]) * write[:, now, None]
            )
            outputs.append((state * read[:, now, None]).sum(-1))
        return torch.stack(outputs, dim=1) + self.skip * x


@architecture("swiglu_block", SEQUENCE)
class GatedBlock(nn.Module):
    """RMS norms around causal attention and a gated feed-forward network (Llama)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(4), nn.RMSNorm(4)])
        self.attention = HandWritten(2, 1, "causal")
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        hidden = self.norms[1](x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))
