"""A recording has more rows than a microbatch: it needs no padded copy of the microbatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import clipped_grad
from clipgrad.compiled import added_rows, trace
from clipgrad.compiled.added_rows import WithAddedRows
from clipgrad.compiled.cuda_graphs import Common, Replay
from clipgrad.compiled.shape import pad_batch, recorded_sizes
from tests.compiled.conftest import Graphs, Recorder
from tests.compiled.test_shape import private
from tests.oracle import clipped_sum, per_sample_gradients
from tests.small_mlp import B, close, definition, make_batch, make_params, mlp

CPU, WEIGHT = torch.device("cpu"), torch.ones(1)


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
    made.prepare([WEIGHT, images(6), torch.arange(6), torch.ones(6)])
    return made


@pytest.mark.parametrize("rows", [3, 4, 5, 6])
def test_a_recording_repeats_the_first_rows(replay: Replay, rows: int) -> None:
    """As a padded copy does: samples of earlier batches may look up what has changed since then."""
    bounds = torch.rand(6)
    for _ in range(2):
        x, y = images(rows), torch.randint(9, (rows,))
        given = [WEIGHT, x, y, bounds]
        assert replay.adds_rows(given)
        products, sums = replay(given)
        x, y = pad_batch([x, y], 6)
        assert torch.equal(products, x)
        assert torch.equal(sums, y + bounds)


def test_what_needs_a_padded_copy(replay: Replay) -> None:
    """Less than half of the rows, a parameter that moved, and what is not recorded."""
    x, y, bounds = images(6), torch.arange(6), torch.ones(6)
    for rows in range(7):
        assert replay.adds_rows([WEIGHT, x[:rows], y[:rows], bounds]) is (rows >= 3)
    assert not replay.adds_rows([WEIGHT.clone(), x, y, bounds])
    unrecorded = Replay(lambda x: [x], [False], Common(range(1)), lambda: Recorder(None))
    assert not unrecorded.adds_rows([x])


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

    optimizer = private(loss_fn, 64, model, compile=True)
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
    """As on a GPU, nobody reads whether all norms are finite."""
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


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 8}])
def test_positions_in_texts_of_changing_length(
    options: dict[str, Any], graphs: Graphs, recorders: list[Recorder]
) -> None:
    """A position of a longer text is out of range in a shorter one, also in a row that is padding."""
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 1), nn.Flatten()).double()

    def loss(model: nn.Module, tokens: Tensor, start: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens), start)

    optimizer = private(loss, 8, model, compile=True, **options)
    for step in range(40):
        size, length = ((8, 4), (8, 9), (5, 4), (5, 9))[step % 4]
        batch = torch.randint(11, (size, length)), torch.full((size,), length - 1)
        optimizer.zero_grad()
        optimizer.backward(*batch)
        sums, _ = clipped_sum(per_sample_gradients(model, loss, batch), 0.5)
        torch.testing.assert_close(optimizer.clipped_sums, sums)
    assert recorders


def test_indices_into_a_window_that_moves(graphs: Graphs, recorders: list[Recorder]) -> None:
    """An index of an earlier batch is out of range, also in a row that is padding."""
    model = nn.Linear(3, 2).double()
    first, window = torch.tensor(0), torch.randn(8, 3, dtype=torch.float64)

    def loss(model: nn.Module, index: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(model(window[index - first]), label)

    optimizer = private(loss, 64, model, compile=True)
    for step in range(20):
        first += 20 * (step % 5 == 4)
        size = (62, 63, 64, 60, 53)[step % 5]
        batch = int(first) + torch.randint(8, (size,)), torch.randint(2, (size,))
        optimizer.zero_grad()
        optimizer.backward(*batch)
        sums, _ = clipped_sum(per_sample_gradients(model, loss, batch), 0.5)
        torch.testing.assert_close(optimizer.clipped_sums, sums)
    assert len(graphs) == 1
