"""Test that batches of different lengths share one graph or have one graph each, and are exact in both cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer, Performance
from clipgrad.compiled import compiled_step, fixed_size
from clipgrad.compiled.shape import recorded_sizes
from tests.compiled.conftest import Graphs, Recorder
from tests.nightly import every, rows, thinned
from tests.oracle import clipped_sum, per_sample_gradients

Loss = Callable[[nn.Module, Tensor], Tensor]


class Text(nn.Module):
    """This small language model has a causal mask."""

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


def of_squares(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().mean()


def with_prefix(model: nn.Module, ids: Tensor) -> Tensor:
    return of_next_word(model, torch.cat([ids.new_zeros(len(ids), 2), ids], 1))


def by_gather(model: nn.Module, ids: Tensor) -> Tensor:
    return -model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()


def optimizer_of(model: nn.Module, loss: Loss, bound: float = 0.5, **options: Any) -> DPOptimizer:
    options = {"expected_batch_size": 4, "microbatch_size": 4, "compile": True, **options}
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss, max_grad_norm=bound, noise_multiplier=0.0, **options
    )  # fmt: skip


def texts(*lengths: int, size: int = 4) -> Iterator[Tensor]:
    for length in lengths:
        yield torch.randint(11, (size, length))


def check(optimizer: DPOptimizer, model: nn.Module, loss: Loss, ids: Tensor) -> None:
    expected, _ = clipped_sum(per_sample_gradients(model, loss, (ids,)), 0.5)
    optimizer.backward(ids)
    torch.testing.assert_close(optimizer.clipped_sums, dict(expected), rtol=0, atol=1e-9)
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("loss", "strategy"),
    rows(
        5,
        [
            (of_next_word, "ghost"),
            (of_next_word, "kept"),
            (of_next_word, "auto"),
            (with_prefix, "auto"),
            (by_gather, "auto"),
        ],
    ),
)
def test_two_graphs_serve_all_lengths(loss: Loss, strategy: str, graphs: Graphs) -> None:
    model = Text().double()
    optimizer = optimizer_of(model, loss, performance=Performance(strategy=strategy))
    for ids in texts(7, 5, 12, 3, 40, 7):
        check(optimizer, model, loss, ids)
    assert len(graphs) == 2


def test_long_texts_whose_embedding_has_many_elements(graphs: Graphs) -> None:
    """Norms of long rows are found in parts, whose number must not become a condition of the graph."""
    model = nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 2)).double()
    optimizer = optimizer_of(model, of_squares)
    for ids in texts(300, 320, 310, 257, 384, 330, 305, 271, 512, 290):
        check(optimizer, model, of_squares, ids)
    assert len(graphs) == 2


def test_a_batch_of_one_text_makes_no_other_graph(graphs: Graphs) -> None:
    """PyTorch's guards saw the number of rows behind the first sample, and 1 is a number of its own."""
    model = Text().double()
    optimizer = optimizer_of(model, of_next_word, expected_batch_size=4, microbatch_size=None)
    for size, length in ((8, 9), (5, 3), (7, 13), (1, 21), (3, 5), (1, 4)):
        check(optimizer, model, of_next_word, torch.randint(11, (size, length)))
    assert len(graphs) == 2


@pytest.mark.parametrize("drop", [nn.Dropout(0.4), nn.AlphaDropout(0.3)])
def test_dropout_draws_what_the_eager_step_draws_for_all_lengths(
    drop: nn.Module, graphs: Graphs
) -> None:
    """Models of Hugging Face drop elements in training."""
    model = nn.Sequential(nn.Embedding(11, 6), drop, nn.Linear(6, 2)).double()
    optimizer = optimizer_of(model, of_squares)
    eager = optimizer_of(model, of_squares, compile=False)
    for ids in texts(7, 5, 12, 3, 40, 7, 9, 4, 6, 8):
        found = []
        for one in (optimizer, eager):
            torch.manual_seed(1)
            one.backward(ids)
            found.append(one.clipped_sums)
            one.zero_grad()
        torch.testing.assert_close(*found)
    assert len(graphs) == 2


class Pair(nn.Module):
    """This model reads two sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(y), self.key(y)).mean((1, 2))


def test_two_lengths_that_agree_by_chance_have_two_symbols(graphs: Graphs) -> None:
    model = Pair().double()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x, y).square().sum()

    optimizer = optimizer_of(model, loss)
    for one, other in ((5, 5), (7, 3), (4, 4), (3, 9), (7, 7)):
        batch = [torch.randn(4, length, 3, dtype=torch.float64) for length in (one, other)]
        expected, _ = clipped_sum(per_sample_gradients(model, loss, tuple(batch)), 0.5)
        optimizer.backward(*batch)
        torch.testing.assert_close(optimizer.clipped_sums, dict(expected), rtol=0, atol=1e-9)
        optimizer.zero_grad()
    assert len(graphs) == 2


@pytest.mark.parametrize("layout", every(2, [torch.channels_last, torch.contiguous_format]))
def test_images_of_several_sizes(layout: torch.memory_format, graphs: Graphs) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU()).double()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).mean((2, 3)).square().sum()

    optimizer = optimizer_of(model, loss)
    for height, width in ((6, 6), (8, 5), (4, 9)):
        x = torch.randn(4, 2, height, width, dtype=torch.float64).to(memory_format=layout)
        check(optimizer, model, loss, x)
    assert len(graphs) <= 4


def by_pooling(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a loss with pooling, whose vmap rule in PyTorch turns sizes into numbers."""
    return F.avg_pool1d(model(ids).mT, 2).square().mean()


@pytest.mark.nightly
def test_a_step_that_needs_numbers_gets_a_graph_for_each_length(graphs: Graphs) -> None:
    model = Text().double()
    optimizer = optimizer_of(model, by_pooling)
    for ids in texts(6, 8, 10, 6, 8, 10):
        check(optimizer, model, by_pooling, ids)
    assert len(graphs) <= 4


def by_length(model: nn.Module, ids: Tensor) -> Tensor:
    return of_next_word(model, ids) * (2 if ids.shape[1] > 8 else 1)


@pytest.mark.nightly
def test_a_loss_that_asks_for_the_length(graphs: Graphs) -> None:
    model = Text().double()
    optimizer = optimizer_of(model, by_length)
    for ids in texts(7, 5, 12, 3, 9, 7, 20, 8):
        check(optimizer, model, by_length, ids)
    assert len(graphs) <= 4


@pytest.mark.nightly
def test_a_length_of_one(graphs: Graphs) -> None:
    """PyTorch treats a size of 1 as a number, so that length has its own graph and other graphs keep symbols."""
    model = Text().double()

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(ids).logsumexp(-1).mean()

    optimizer = optimizer_of(model, loss)
    for ids in texts(5, 1, 7, 3, 1, 9):
        check(optimizer, model, loss, ids)
    assert len(graphs) == 3


def all_three(x: Tensor) -> Tensor:
    """Pad, concatenate and gather."""
    joined = torch.cat(
        [torch.tensor([]), F.pad(x, (1, 2)), x.new_ones(1, 1, 6).expand(x.shape[0], 1, 6)], -2
    )
    return torch.ops.aten.gather(joined, 2, index=joined.argsort(2))


@pytest.mark.parametrize(
    "pad",
    thinned(
        [
            all_three,
            lambda x: F.pad(x, (1, 2)),
            lambda x: F.pad(x, (-1, 2, 0, 1), value=3.0),
            lambda x: torch.constant_pad_nd(x, (0, 1, 2, -1), 0.5),
            lambda x: torch.ops.aten.pad(x, [1, 0]),
            lambda x: torch.ops.aten.constant_pad_nd.default(x, [1, 1]),
            lambda x: F.pad(x, (1, 1), mode="reflect"),
            lambda x: torch.cat([torch.tensor([]), x, x.new_empty(0), x], -2),
            lambda x: torch.concat([x, x[:, :1]], axis=-2),
            lambda x: torch.concatenate((x, x.new_ones(1, 1, x.shape[2])), dim=1),
            lambda x: torch.ops.aten.cat([x, x], 2),
            lambda x: torch.gather(x, 1, x.argsort(1)),
            lambda x: x.gather(-1, torch.zeros(1, 1, 1, dtype=torch.long)),
            lambda x: torch.ops.aten.gather(x, 2, index=x.argsort(2)),
            F.rrelu,  # has no batching rule, so it runs on one sample after the other
        ],
        lambda pad: pad is all_three,
    ),
)
def test_operations_on_the_whole_batch(pad: Callable[[Tensor], Tensor], graphs: Graphs) -> None:
    """Padding, concatenation and gather are exact under each name, for shared and for per-sample tensors."""
    model = nn.Linear(3, 3).double()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return pad(model(x)).pow(2).cumsum(1).mean()

    optimizer = optimizer_of(model, loss)
    for length in (4, 6, 5):
        check(optimizer, model, loss, torch.randn(4, length, 3, dtype=torch.float64))
    assert len(graphs) <= 3


def test_lengths_that_come_again_are_recorded_up_to_a_limit(
    graphs: Graphs, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first graph is for the first length alone, and recorded at once."""
    monkeypatch.setattr(compiled_step, "RECORDINGS", 3)
    model = Text().double()
    optimizer = optimizer_of(model, of_next_word)
    for recordings in (1, 1, 4, 4):
        for ids in texts(7, 5, 12, 3, 9):
            check(optimizer, model, of_next_word, ids)
        assert len(graphs) == 2
        assert len(recorders) == recordings


def test_poisson_batches_of_texts_are_padded_to_a_few_sizes(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    """Rows and lengths differ, so fewer numbers of rows are recorded, at the third batch of a size."""
    model = Text().double()
    optimizer = optimizer_of(model, of_next_word, expected_batch_size=16, microbatch_size=None)
    for size, length in ((16, 7), (24, 5), (17, 5)):
        check(optimizer, model, of_next_word, torch.randint(11, (size, length)))
    with_the_graph = len(recorders)
    assert recorded_sizes(fixed_size(16), apart=1.0) == (8, 12, 14, 16, 20, 24)
    for size in (17, 18, 19, 20, 16, 17):
        for ids in texts(5, 6, 9, size=size):
            check(optimizer, model, of_next_word, ids)
    assert len(graphs) == 2
    assert len(recorders) - with_the_graph == 3  # of 20 rows for each length, and none of 16
