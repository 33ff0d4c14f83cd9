"""Rows that a recording adds to a microbatch that has fewer, without a padded copy of the microbatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer
from clipgrad.compiled import added_rows
from clipgrad.compiled.added_rows import WithAddedRows
from clipgrad.compiled.cuda_graphs import Common, Replay
from clipgrad.compiled.shape import pad_batch, recorded_sizes
from tests.compiled.conftest import Graphs, Recorder
from tests.oracle import clipped_sum, per_sample_gradients

CPU = torch.device("cpu")


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 2, 2).to(memory_format=torch.channels_last)


@pytest.fixture
def replay() -> Replay:
    """A recording of six rows."""
    Recorder.made = []
    common = Common(range(1, 3))
    made = Replay(
        lambda w, x, y, b: [w * x, y + b], [True, False, False, False], common, lambda: Recorder(None)
    )  # fmt: skip
    made.prepare([torch.ones(1), images(6), torch.arange(6), torch.ones(6)])
    return made


@pytest.mark.parametrize("rows", [3, 4, 5, 6])
def test_a_recording_repeats_the_first_rows(replay: Replay, rows: int) -> None:
    (weight, *_), bounds = replay._inputs, torch.rand(6)
    for _ in range(2):
        x, y = images(rows), torch.randint(9, (rows,))
        given = [weight, x, y, bounds]
        assert replay.can_replay(given)
        replay.start(given)
        products, sums = replay.results(0)
        x, y = pad_batch([x, y], 6)
        assert torch.equal(products, x)
        assert torch.equal(sums, y + bounds)


def test_other_arguments_are_not_replayed(replay: Replay) -> None:
    """Fewer rows than half, more rows, rows of one leaf only, another layout, dtype or shape."""
    (weight, *_), bounds = replay._inputs, torch.ones(6)
    x, y = images(4), torch.arange(4)
    refused: list[list[Tensor]] = [
        [images(2), torch.arange(2), bounds],
        [images(0), torch.arange(0), bounds],
        [images(7), torch.arange(7), bounds],
        [x, torch.arange(5), bounds],
        [x, torch.arange(6), bounds],
        [x.contiguous(), y, bounds],
        [x.double(), y, bounds],
        [x, y.int(), bounds],
        [x[:, :2], y, bounds],
        [x, y.reshape(4, 1), bounds],
        [x, y, torch.ones(4)],
    ]
    assert replay.can_replay([weight, x, y, bounds])
    for case in refused:
        assert not replay.can_replay([weight, *case])


def test_added_rows_are_padding() -> None:
    x, y, mask = torch.randn(3, 2), torch.arange(3), torch.tensor([False, True, False])
    piece = WithAddedRows([x, "constant", y], mask, 3, 5, CPU)
    assert piece.shapes == ((5, 2), (5,))
    assert piece.padding.tolist() == [False, True, False, True, True]
    assert piece.fitted[0].data_ptr() == x.data_ptr()
    assert piece.fitted[1] == piece.padded[1] == "constant"
    assert torch.equal(piece.padded[0], torch.cat([x, x[:2]]))
    assert torch.equal(piece.padded[2], torch.tensor([0, 1, 2, 0, 1]))


def test_poisson_batches_are_padded_in_the_recordings_memory(
    graphs: Graphs, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only runs that are compared with the eager step pad a copy."""
    padded: list[int] = []

    def counted(batch: Any, size: int) -> list[Any]:
        padded.extend([size] if len(batch[0]) < size else [])
        return pad_batch(batch, size)

    monkeypatch.setattr(added_rows, "pad_batch", counted)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters()), model, loss_fn, max_grad_norm=0.5, noise_multiplier=0.0,
        expected_batch_size=64, compile=True,
    )  # fmt: skip
    x, y = torch.randn(64, 3, dtype=torch.float64), torch.randint(2, (64,))
    expected = per_sample_gradients(model, loss_fn, (x, y))
    sizes = [size for size in range(50, 64) if size not in recorded_sizes(80)]
    assert len(sizes) > 8
    for run, size in enumerate(sizes, start=1):
        optimizer.backward(x[:size], y[:size])
        sums, norms = clipped_sum({n: g[:size] for n, g in expected.items()}, 0.5)
        torch.testing.assert_close(optimizer.clipped_sums, sums)
        torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms)
        optimizer.zero_grad()
        if run in (4, 7):
            copies = len(padded)
    assert copies == len(padded) - 1  # of run 8
    assert len(graphs) == 1
