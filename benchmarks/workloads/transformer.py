"""What is measured: models, losses and synthetic batches from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model with its loss and batches.

    Attributes:
        name: Row of the tables.
        model: Makes the model.
        batch: From a batch size to the arguments of the loss.
        loss: ``loss(model, *batch)``.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]


def cnn(size: int, channels: tuple[int, ...], hidden: int) -> nn.Module:
    """3x3 convolutions with ReLU and 2x2 max-pool, one hidden layer, 10 classes."""
    layers: list[nn.Module] = []
    before = 3
    for width in channels:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    features = before * (size // 2 ** len(channels)) ** 2
    layers += [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers)


def images(size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, 3, size, size), torch.randint(0, 10, (batch_size,))


def classification(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


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


def _cnn(name: str, size: int, channels: tuple[int, ...], hidden: int) -> Workload:
    return Workload(
        name, partial(cnn, size, channels, hidden), partial(images, size), classification
    )


def _transformer(name: str, **shape: Any) -> Workload:
    return Workload(
        name,
        partial(CausalTransformer, **shape),
        partial(tokens, shape["vocabulary"], shape["tokens"]),
        next_token,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        _cnn("cnn-small", 32, (32, 64), 256),
        _cnn("cnn-medium", 64, (64, 128, 256), 1024),
        _transformer("transformer-small", vocabulary=1000, width=256, heads=4, layers=2, tokens=64),
        _transformer(
            "transformer-768x256", vocabulary=1000, width=768, heads=12, layers=6, tokens=256
        ),
        _transformer(
            "transformer-768x1024", vocabulary=1000, width=768, heads=12, layers=6, tokens=1024
        ),
    )
}
