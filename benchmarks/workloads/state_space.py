"""A causal language model that mixes positions by convolutions as long as the sequence, as state-space models do."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads._workload import Workload
from benchmarks.workloads.transformer import next_token, tokens


class LongConvolution(nn.Module):
    """A filter of its own for every channel, reaching back to the first position."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.past = length - 1
        self.filters = nn.Conv1d(width, width, length, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.filters(F.pad(x.transpose(1, 2), (self.past, 0))).transpose(1, 2)
        return result


class GatedBlock(nn.Module):
    """Pre-norm, long convolution, multiplicative gate, one projection in and one out."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into = nn.Linear(width, 2 * width)
        self.mix = LongConvolution(width, length)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.into(self.norm(x)).chunk(2, dim=-1)
        result: Tensor = x + self.out(self.mix(value) * F.silu(gate))
        return result


class StateSpaceModel(nn.Module):
    """The convolutions know positions, so nothing else has to; input and output embedding untied."""

    def __init__(self, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(GatedBlock(width, length) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _workload(
    name: str, width: int, layers: int, length: int, cpu: tuple[int, ...], cuda: tuple[int, ...]
) -> Workload:
    vocabulary = 1000
    return Workload(
        name=name,
        description=f"causal, vocabulary {vocabulary}, width {width}, {layers} gated depthwise convolutions "
        f"of length {length}, {length} tokens",
        model=partial(StateSpaceModel, vocabulary, width, layers, length),
        batch=partial(tokens, vocabulary, length),
        loss=next_token,
        batch_sizes={"cpu": cpu, "cuda": cuda},
    )


STATE_SPACE = (_workload("state-space", 192, 3, 256, cpu=(16,), cuda=(32,)),)
