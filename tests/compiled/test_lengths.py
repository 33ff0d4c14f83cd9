"""Batches of different lengths: one graph for all of them, or as many graphs as before, and exact in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer
from tests.compiled.conftest import Graphs
from tests.oracle import clipped_sum, per_sample_gradients

Loss = Callable[[nn.Module, Tensor], Tensor]


class Text(nn.Module):
    """A small language model with a causal mask."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        q = self.query(x)[:, None]
        x = x + F.scaled_dot_product_attention(q, q, x[:, None], is_causal=True)[:, 0]
        logits: Tensor = self.head(x)
        return logits


def of_next_word(model: nn.Module, ids: Tensor) -> Tensor:
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)


def with_prefix(model: nn.Module, ids: Tensor) -> Tensor:
    return of_next_word(model, torch.cat([ids.new_zeros(len(ids), 2), ids], 1))


def by_gather(model: nn.Module, ids: Tensor) -> Tensor:
    return -model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()


def optimizer_of(model: nn.Module, loss: Loss, bound: float = 0.5, **options: object) -> DPOptimizer:
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss, max_grad_norm=bound, noise_multiplier=0.0,
        expected_batch_size=4, microbatch_size=4, compile=True, **options,
    )  # fmt: skip


def texts(*lengths: int, size: int = 4) -> Iterator[Tensor]:
    for length in lengths:
        yield torch.randint(11, (size, length))


def check(optimizer: DPOptimizer, model: nn.Module, loss: Loss, ids: Tensor) -> None:
    expected, _ = clipped_sum(per_sample_gradients(model, loss, (ids,)), 0.5)
    optimizer.backward(ids)
    torch.testing.assert_close(optimizer.clipped_sums, dict(expected), rtol=0, atol=1e-9)
    optimizer.zero_grad()


@pytest.mark.parametrize("loss", [of_next_word, with_prefix, by_gather])
def test_two_graphs_serve_all_lengths(loss: Loss, graphs: Graphs) -> None:
    model = Text().double()
    optimizer = optimizer_of(model, loss)
    for ids in texts(7, 5, 12, 3, 9, 7, 40, 5, 23):
        check(optimizer, model, loss, ids)
    assert len(graphs) == 2


@pytest.mark.parametrize("strategy", ["kept", "ghost", "recompute"])
def test_every_way_to_find_norms(strategy: str, graphs: Graphs) -> None:
    from clipgrad import Performance

    model = Text().double()
    optimizer = optimizer_of(model, of_next_word, performance=Performance(strategy=strategy))
    for ids in texts(7, 5, 12, 3):
        check(optimizer, model, of_next_word, ids)
    assert len(graphs) == 2
