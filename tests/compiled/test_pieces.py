"""A graph is traced without memory, and compared with an eager step even where that does not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from clipgrad import DPOptimizer, Performance, clipped_grad
from clipgrad.compiled import check, eager, runner
from clipgrad.compiled import trace as trace_module
from clipgrad.engine import microbatch
from clipgrad.engine.clip_and_sum import MicrobatchResult, joined
from clipgrad.engine.sums_on_host import SumsOnHost
from clipgrad.errors import CompileMismatchError
from tests.architectures.indexing import WeightSlices
from tests.compiled.conftest import Graphs
from tests.nightly import every
from tests.small_mlp import B, definition, make_batch, make_params, median_norm, mlp

close = torch.testing.assert_close


@pytest.fixture
def eager_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let memory run out with more than two rows, and note the rows of each eager run."""
    seen: list[int] = []

    def noting(loss: Any, names: Any, params: Any, batch: Sequence[Any], *rest: Any) -> Any:
        seen.append(len(batch[0]))
        if seen[-1] > 2:
            raise torch.OutOfMemoryError("planted")
        return microbatch.run(loss, names, params, batch, *rest)

    monkeypatch.setattr(eager, "run", noting)
    monkeypatch.setattr(eager, "_PIECES", 4)
    return seen


def test_compared_in_pieces(graphs: Graphs, eager_rows: list[int]) -> None:
    params, batch = make_params(), make_batch()
    norm = median_norm(params, *batch)
    gradient = clipped_grad(mlp, max_grad_norm=norm, compile=True, microbatch_size=B)
    found = gradient(params, *batch)
    assert eager_rows == [B, 2, 2, 2]
    expected, norms = definition(params, *batch, norm=norm)
    for name, value in expected.items():
        close(found.grads[name], value, rtol=1e-12, atol=1e-12)
    close(found.grad_norms, norms)


@pytest.mark.parametrize("place", every(2, [0, 3, 5]))
def test_a_fault_in_any_piece_is_seen(place: int, graphs: Graphs, eager_rows: list[int]) -> None:
    def without_a_sample(module: Any) -> Any:
        def run(*flat: Tensor) -> list[Tensor]:
            results = [result.clone() for result in module(*flat)]
            results[5][place] *= 0.99  # norms follow four sums and the losses
            return results

        return run

    graphs.alter = without_a_sample
    with pytest.raises(CompileMismatchError, match="norms"):
        clipped_grad(mlp, max_grad_norm=0.5, compile=True)(make_params(), *make_batch())


def test_random_numbers_are_drawn_at_once(graphs: Graphs, eager_rows: list[int]) -> None:
    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mlp(p, F.dropout(x), y)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        clipped_grad(loss, max_grad_norm=0.5, compile=True)(make_params(), *make_batch())
    assert eager_rows == [B]
    (note,) = caught.value.__notes__
    assert "Set microbatch_size to 3 or less" in note


def test_a_sample_that_is_not_finite_is_dropped_in_pieces(
    graphs: Graphs, eager_rows: list[int]
) -> None:
    params, (x, y) = make_params(), make_batch()
    x[2] = torch.inf
    results = {
        compile: clipped_grad(mlp, max_grad_norm=0.5, compile=compile)(params, x, y)
        for compile in (True, False)
    }
    assert eager_rows == [B, 2, 2, 2]
    assert results[True].num_nonfinite == 1
    close(results[True].grads, results[False].grads)


def test_joined_keeps_one_total() -> None:
    def piece(value: float) -> MicrobatchResult:
        one = torch.full((1,), value)
        return MicrobatchResult([torch.full((3,), value)], one, [one], {"a": one}, one > 2)

    made = [piece(1.0), piece(2.0), piece(3.0)]
    found = joined(iter(made))
    close(found.sums, [torch.full((3,), 6.0)])
    assert found.sums[0] is made[0].sums[0]
    for whole in (found.values, found.norms[0], found.aux["a"]):
        close(whole, torch.tensor([1.0, 2.0, 3.0]))
    assert found.nonfinite.tolist() == [False, False, True]


@pytest.fixture
def traced_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each trace ran on fake tensors."""
    seen: list[bool] = []

    def noting(loss: Any, names: Any, params: Any, *rest: Any) -> Any:
        seen.append(isinstance(params[0], FakeTensor))
        return microbatch.run(loss, names, params, *rest)

    monkeypatch.setattr(trace_module, "run", noting)
    return seen


def test_traced_on_fake_tensors(graphs: Graphs, traced_on: list[bool]) -> None:
    performance = Performance(strategy="ghost")
    gradient = clipped_grad(
        mlp, max_grad_norm=0.5, compile=True, microbatch_size=B, performance=performance
    )
    gradient(make_params(), *make_batch())
    assert traced_on == [True]


def test_traced_on_the_batch_if_nothing_else_works(
    graphs: Graphs, traced_on: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Where slices of a weight lie is read from values, which fake tensors do not have."""
    torch.manual_seed(0)
    model = WeightSlices().double()
    with caplog.at_level(logging.INFO, logger="clipgrad"):
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda m, x: m(x).square().mean(), max_grad_norm=1.0,
            noise_multiplier=0.0, expected_batch_size=4, microbatch_size=4, compile=True,
        )  # fmt: skip
        optimizer.backward(torch.randn(4, 5, 4, dtype=torch.float64))
    assert traced_on == [True, False]
    assert "cannot be traced on fake tensors" in caplog.text


def test_the_value_of_a_parameter_without_axes_is_no_constant(traced_on: list[bool]) -> None:
    """PyTorch may take the number in a tensor without axes for a symbol."""
    params, batch = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=0.5, compile=True, microbatch_size=B)
    for gain in (params["gain"], params["gain"] * 3 + 1):
        params["gain"] = gain
        expected, _ = definition(params, *batch, norm=0.5)
        for name, value in gradient(params, *batch).grads.items():
            close(value, expected[name], rtol=1e-12, atol=1e-12)
    assert traced_on == [True]


def test_sums_of_a_comparison_lie_on_the_host(
    graphs: Graphs, eager_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter's sum is formed at a time, and none is formed twice."""
    params, batch = make_params(), make_batch()
    norm = median_norm(params, *batch)
    compared: list[list[Tensor]] = []
    compare = check.compare

    def noting(compiled: MicrobatchResult, expected: MicrobatchResult, *rest: Any) -> None:
        compared.append(expected.sums)
        compare(compiled, expected, *rest)

    made: list[SumsOnHost] = []
    monkeypatch.setattr(runner, "compare", noting)
    monkeypatch.setattr(eager, "SumsOnHost", lambda: made.append(SumsOnHost()) or made[-1])
    clipped_grad(mlp, max_grad_norm=norm, compile=True, microbatch_size=B)(params, *batch)
    expected, _ = definition(params, *batch, norm=norm)
    (ranks,) = made
    assert compared == [ranks.totals]
    for total, value in zip(compared[0], expected.values(), strict=True):
        close(total, value, rtol=1e-12, atol=1e-12)


def test_sums_that_leave_are_formed_after_the_check() -> None:
    """A sample that is not finite would be in the total already."""
    params, (x, y) = make_params(), make_batch()
    x[2] = torch.nan
    gradient = clipped_grad(mlp, max_grad_norm=0.5)
    gradient.clipper.ranks = ranks = SumsOnHost()
    with pytest.raises(ValueError, match="shorter than argument"):  # none of the sums is here
        gradient(params, x, y)
    rest = torch.arange(B) != 2
    expected, _ = definition(params, x[rest], y[rest], norm=0.5)
    for total, value in zip(ranks.totals, expected.values(), strict=True):
        close(total, value, rtol=1e-12, atol=1e-12)
