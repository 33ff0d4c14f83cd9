"""A recording has more rows than a microbatch: it needs no padded copy of the microbatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer, clipped_grad
from clipgrad.compiled import added_rows, trace
from clipgrad.compiled.added_rows import WithAddedRows
from clipgrad.compiled.cuda_graphs import Common, Replay
from clipgrad.compiled.shape import pad_batch, recorded_sizes
from tests.compiled.conftest import Graphs, Recorder
from tests.oracle import clipped_sum, per_sample_gradients
from tests.small_mlp import B, close, definition, make_batch, make_params, mlp

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


def test_rows_that_a_batch_lacks_keep_samples_of_earlier_batches(replay: Replay) -> None:
    """Nothing else: memory that was never written to may hold NaN, or indices out of range."""
    (weight, x, y, _), bounds = replay._inputs, torch.rand(6)
    known_x, known_y = x.clone(), y.clone()
    for rows in (6, 4, 1, 5, 2):
        x, y = images(rows), torch.randint(9, (rows,))
        known_x[:rows], known_y[:rows] = x, y
        given = [weight, x, y, bounds]
        assert replay.can_replay(given)
        replay.start(given)
        products, sums = replay.results(0)
        assert torch.equal(products, known_x)
        assert torch.equal(sums, known_y + bounds)


def test_other_arguments_are_not_replayed(replay: Replay) -> None:
    """More rows, rows of one leaf only, another layout, dtype or shape."""
    (weight, *_), bounds = replay._inputs, torch.ones(6)
    x, y = images(4), torch.arange(4)
    refused: list[list[Tensor]] = [
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


def test_only_runs_that_are_compared_pad_a_copy(
    graphs: Graphs, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("nan_safe", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_of_an_earlier_batch_contributes_nothing(
    nan_safe: bool,
    value: float,
    graphs: Graphs,
    recorders: list[Recorder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is selected out, not multiplied by zero: as on a GPU, nobody reads whether all norms are finite."""
    monkeypatch.setattr(trace, "checks_finite_on_host", lambda device: False)
    params, (x, y) = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=0.5, nan_safe=nan_safe, microbatch_size=B, compile=True)  # fmt: skip
    bad = x.clone()
    bad[B - 2 :] = value
    for _ in range(3):
        for _ in range(2):
            gradient(params, bad, y)
        for rows in (B - 2, 1, B - 3, B - 2):
            result = gradient(params, x[:rows], y[:rows])
            close(result.grads, definition(params, x[:rows], y[:rows], norm=0.5)[0])
            assert int(result.num_nonfinite) == 0
    assert len(recorders) == len(graphs) == 1
