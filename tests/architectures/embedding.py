"""nn.Embedding and nn.EmbeddingBag with their options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._base import add, architecture, floats, freeze, ids, normal, several

TOKENS = ids(6, 5)


def _table(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4, **options), nn.Tanh(), nn.Linear(4, 3))


add("embedding", _table, TOKENS, "ids repeat within a sample")
add("embedding_2d_ids", _table, ids(6, 2, 3), "ids with two axes")
add("embedding_one_id", _table, ids(6), "one id per sample: no position axis")
add(
    "embedding_padding_idx",
    lambda: _table(padding_idx=0),
    TOKENS,
    "the padding row gets no gradient",
)
add(
    "embedding_negative_padding",
    lambda: _table(padding_idx=-2),
    TOKENS,
    "padding_idx counted from the end",
)
add(
    "embedding_scale_by_freq",
    lambda: _table(scale_grad_by_freq=True),
    TOKENS,
    "the gradient is divided by how often the id occurs within the sample",
    may_refuse=r"scale_grad_by_freq",
)
add(
    "embedding_sparse",
    lambda: _table(sparse=True),
    TOKENS,
    "sparse gradients",
    may_refuse=r"sparse",
)
add("embedding_frozen", _table, TOKENS, "a frozen table", trainable=freeze("0"))


class Bag(nn.Module):
    """nn.EmbeddingBag over two-dimensional ids, optionally weighted."""

    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 4, mode=mode, **options), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(self.bag(tokens, per_sample_weights=weights).tanh())


for _mode in ("sum", "mean", "max"):
    add(
        f"embedding_bag_{_mode}",
        lambda mode=_mode: Bag(mode),
        TOKENS,
        f"EmbeddingBag, mode {_mode}, without offsets",
    )
add(
    "embedding_bag_weighted",
    lambda: Bag("sum"),
    several(TOKENS, floats(5)),
    "EmbeddingBag with per-sample weights",
)
add(
    "embedding_bag_padding",
    lambda: Bag("mean", padding_idx=0),
    TOKENS,
    "EmbeddingBag that leaves the padding id out of its mean",
)


@architecture("embedding_bag_offsets", TOKENS)
class BagOffsets(nn.Module):
    """EmbeddingBag with flat ids and offsets computed from the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="sum")

    def forward(self, tokens: Tensor) -> Tensor:
        size, length = tokens.shape
        offsets = torch.arange(0, size * length, length, device=tokens.device)
        return self.bag(tokens.flatten(), offsets).tanh()


@architecture("position_ids", TOKENS)
class PositionIds(nn.Module):
    """Position ids by torch.arange, which no sample influences, broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(6, 4), nn.Embedding(9, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head((self.tokens(tokens) + self.positions(steps)).tanh())


@architecture("factorisation_machine", several(ids(7, 3), floats(3)))
class FactorisationMachine(nn.Module):
    """Wide and deep: two tables share the ids, one of them with rows of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.bias = nn.Embedding(7, 1), nn.Embedding(7, 4), normal(1)

    def forward(self, fields: Tensor, values: Tensor) -> Tensor:
        factors = self.deep(fields) * values.unsqueeze(-1)
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(-1)
        return self.bias + (self.wide(fields).squeeze(-1) * values).sum(1) + 0.5 * pairs
