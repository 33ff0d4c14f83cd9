"""Causal language models, input and output embedding untied."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads._workload import Workload


class CausalTransformer(nn.Module):
    """Learned positions, pre-norm blocks, untied output layer."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, d))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return result


def tokens(vocabulary: int, length: int, batch_size: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, vocabulary, (batch_size, length + 1)),)


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _workload(
    name: str,
    width: int,
    heads: int,
    layers: int,
    length: int,
    cpu: tuple[int, ...],
    cuda: tuple[int, ...],
) -> Workload:
    vocabulary = 1000
    return Workload(
        name=name,
        description=f"causal, vocabulary {vocabulary}, width {width}, {heads} heads, {layers} layers, {length} tokens",
        model=partial(CausalTransformer, vocabulary, width, heads, layers, length),
        batch=partial(tokens, vocabulary, length),
        loss=next_token,
        batch_sizes={"cpu": cpu, "cuda": cuda},
    )


TRANSFORMERS = (
    _workload("transformer-small", 256, 4, 2, 64, cpu=(32,), cuda=(32,)),
    _workload("transformer-medium", 384, 8, 6, 128, cpu=(16,), cuda=(32,)),
    _workload("transformer-768x256", 768, 12, 6, 256, cpu=(), cuda=(32,)),
    _workload("transformer-768x1024", 768, 12, 6, 1024, cpu=(), cuda=(8,)),
)
