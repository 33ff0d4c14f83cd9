"""Batches of every size share one graph; what is padding contributes exactly nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from clipgrad import DPOptimizer, clipped_grad
from clipgrad._functorch import is_symbol
from clipgrad.compiled import backend, fixed_size
from clipgrad.compiled.compiler import FEWEST_ROWS
from clipgrad.compiled.shape import Rows, pad_rows, recorded_sizes
from clipgrad.engine import bundle, gradients
from tests.compiled.conftest import Graphs
from tests.nightly import some
from tests.oracle import clipped_sum, per_sample_gradients
from tests.small_mlp import (
    INPUTS,
    B,
    assert_same,
    close,
    definition,
    draw,
    make_batch,
    make_params,
    mlp,
)


def test_every_size_shares_a_graph(graphs: Graphs) -> None:
    params = make_params()
    compiled, eager = (
        clipped_grad(mlp, max_grad_norm=0.5, microbatch_size=4, compile=c) for c in (True, False)
    )
    for size in (3, 4, 1, 0, 9, 5):
        batch = draw(size, INPUTS), torch.randint(2, (size,))
        assert_same(compiled(params, *batch), eager(params, *batch))
    assert len(graphs) == 1


def test_first_batch_decides_where_the_user_does_not(graphs: Graphs) -> None:
    params, (x, y) = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=0.5, compile=True)
    for rows in (0, 4, 6, 2):
        result = gradient(params, x[:rows], y[:rows])
        if rows:
            close(result.grads, definition(params, x[:rows], y[:rows], norm=0.5)[0])
    assert len(graphs) == 1


@pytest.mark.nightly
def test_the_distance_of_rows_makes_no_other_graph(graphs: Graphs) -> None:
    params, (x, y) = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=0.5, compile=True)
    for rows in (x, x[::2], x.flip(0), x[:1].expand(5, -1), torch.cat([x, x], 1)[:, :INPUTS]):
        labels = y[: len(rows)]
        result = gradient(params, rows, labels)
        close(result.grads, definition(params, rows, labels, norm=0.5)[0])
    assert len(graphs) == 1


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def reflected(model: nn.Module, x: Tensor) -> Tensor:
    """PyTorch's rule for this padding under vmap asks for the number of rows."""
    return F.pad(model(x), (1, 1), mode="reflect").square().mean()


def private(
    loss: Callable[..., Tensor], expected: int, model: nn.Module | None = None, **options: object
) -> DPOptimizer:
    model = model or nn.Linear(3, 2).double()
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss, max_grad_norm=0.5, noise_multiplier=0.0,
        expected_batch_size=expected, **options,
    )  # fmt: skip


def check(optimizer: DPOptimizer, size: int) -> None:
    """Compare one batch with the loop over its samples."""
    model, loss, x = optimizer.model, optimizer.loss_fn, draw(size, 3)
    optimizer.zero_grad()
    optimizer.backward(x)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    if size:
        sums |= clipped_sum(per_sample_gradients(model, loss, (x,)), 0.5)[0]
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)


EXPECTED = 16
SIZES = (EXPECTED, 0, 1, 2, EXPECTED + 12, 7, fixed_size(EXPECTED), 3 * EXPECTED + 1, 1)
"""Sizes of Poisson batches: the mean, none, one, three standard deviations above, and larger than all before."""


@pytest.mark.parametrize("compile", [True, False])
def test_poisson_batches_of_every_size_equal_the_loop(compile: bool, graphs: Graphs) -> None:
    optimizer = private(squares, EXPECTED, compile=compile)
    for size in SIZES:
        check(optimizer, size)
    assert len(graphs) == compile
    if compile:
        placeholders = graphs.modules[0].graph.find_nodes(op="placeholder")
        sizes = [size for node in placeholders for size in node.meta["val"].shape]
        assert any(isinstance(size, torch.SymInt) for size in sizes)


def test_a_first_batch_of_one_sample_fixes_no_size(graphs: Graphs) -> None:
    optimizer = private(squares, EXPECTED, compile=True)
    for size in (1, 5, 1, 2):
        check(optimizer, size)
    assert len(graphs) == 1


def test_a_step_that_needs_the_number_of_rows_pads_poisson_batches(graphs: Graphs) -> None:
    optimizer = private(reflected, EXPECTED, compile=True)
    for size in SIZES:
        check(optimizer, size)
    assert len(graphs) == 1
    assert fixed_size(EXPECTED) == 24
    shapes = [n.meta["val"].shape for n in graphs.modules[0].graph.nodes if n.op == "placeholder"]
    assert torch.Size([24, 3]) in shapes


def test_a_number_of_rows_that_the_user_set_is_padded_to(graphs: Graphs) -> None:
    optimizer = private(squares, EXPECTED, compile=True, microbatch_size=EXPECTED)
    for size in SIZES:
        check(optimizer, size)
    shapes = [n.meta["val"].shape for n in graphs.modules[0].graph.nodes if n.op == "placeholder"]
    assert torch.Size([EXPECTED, 3]) in shapes


def test_runs_of_a_large_batch_have_equal_sizes() -> None:
    rows = Rows(2, 24)
    assert [rows.at_once(size) for size in (0, 1, 24, 25, 48, 49)] == [24, 1, 24, 13, 24, 17]
    assert [rows.padded(count) for count in (1, 2, 24)] == [2, 2, 24]
    assert [Rows(24, 24).at_once(size) for size in (0, 25)] == [24, 24]
    assert Rows(24, 24).padded(3) == 24


def test_batches_smaller_than_a_graph_allows_are_padded(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Inductor does, the stand-in for the compiler assumes that there are several rows."""
    compile_graph = backend.compile_graph

    def assuming(module: GraphModule, mode: str, arguments: Sequence[Tensor]) -> Any:
        rows = next(size for tensor in arguments for size in tensor.shape if is_symbol(size))
        assert rows >= 6
        return compile_graph(module, mode, arguments)

    monkeypatch.setattr(backend, "compile_graph", assuming)
    optimizer = private(squares, EXPECTED, compile=True)
    for size in (1, 6, 0, 5, EXPECTED, 3 * EXPECTED, 7):
        check(optimizer, size)
    assert len(graphs) == 1


@pytest.mark.parametrize(("value", "padded"), some(2, [torch.nan, torch.inf], [False, True]))
def test_a_sample_that_is_not_finite_contributes_nothing(
    value: float, padded: bool, graphs: Graphs
) -> None:
    params, (x, y) = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=0.5, microbatch_size=4, compile=True)
    x = x.clone()
    x[1], x[5] = value, value
    mask = (torch.arange(B) == 1) | (torch.arange(B) == 5) if padded else None
    keep = [0, 2, 3, 4]
    for _ in range(2):
        result = gradient(params, x, y, is_padding=mask)
        close(result.grads, definition(params, x[keep], y[keep], norm=0.5)[0])
        assert int(result.num_nonfinite) == (0 if padded else 2)
    x[1], x[5] = 0.0, 0.0
    close(gradient(params, x, y).grads, definition(params, x, y, norm=0.5)[0])
    assert len(graphs) == 1


def test_without_nan_safety_a_nan_spreads(graphs: Graphs) -> None:
    params, (x, y) = make_params(), make_batch()
    x[1] = torch.nan
    gradient = clipped_grad(mlp, max_grad_norm=1.0, nan_safe=False, microbatch_size=4, compile=True)
    assert all(g.isnan().all() for g in gradient(params, x, y).grads.values())


@pytest.mark.parametrize(
    "shape", [(3, 4), (3, 1, 4), (3, 2, 1, 5), (3, 2, 4, 5), (3, 2, 4, 5, 6), (3,)]
)
def test_fitted_rows_and_strides(shape: tuple[int, ...]) -> None:
    full = torch.arange(7 * torch.Size(shape[1:]).numel()).view(7, *shape[1:])
    kinds = {full[:3], full[2:5], full.flip(0).flip(0)[:3]}
    if len(shape) > 1:
        kinds.add(full.transpose(0, -1).contiguous().transpose(0, -1)[:3])
    for leaf in kinds:
        found = pad_rows(leaf, 7)
        assert found.stride() == pad_rows(full, 7).stride()
        assert torch.equal(found, leaf[torch.arange(7) % 3])
    assert pad_rows(full, 7).data_ptr() == full.data_ptr()  # a full batch is not copied


@pytest.mark.parametrize("expected", [4, 14, 16, 32, 56, 64, 256, 1024])
def test_padding_to_a_few_sizes_costs_little(expected: int) -> None:
    """Rows that run, for each sample of Poisson batches; before, one size was for all, and 16 cost 1.53."""
    most = fixed_size(expected)
    rows = Rows(FEWEST_ROWS, most, recorded_sizes(most))
    assert rows.few[-1] == most
    assert len(rows.few) <= 20
    drawn = torch.poisson(torch.full((4000,), float(expected))).long().tolist()
    ran = 0
    for count in drawn:
        at_once = rows.at_once(count)
        for start in range(0, count, at_once):
            size = rows.padded(min(at_once, count - start))
            assert size in rows.few
            assert size >= min(at_once, count - start)
            ran += size
    assert ran / sum(drawn) < 1.025


def test_a_graph_with_a_fewest_number_of_rows_is_not_given_fewer() -> None:
    rows = Rows(5, 8, (2, 4, 6, 8))
    assert [rows.padded(count) for count in range(1, 9)] == [6, 6, 6, 6, 6, 6, 8, 8]
    assert Rows(8, 8, (2, 4, 6, 8)).padded(1) == 8


@pytest.fixture
def rows_run(graphs: Graphs) -> list[int]:
    """The number of rows of each run of a graph."""
    found: list[int] = []

    def run(module: GraphModule) -> Callable[..., Any]:
        def counted(*arguments: Tensor) -> Any:
            found.extend(a.shape[0] for a in arguments if a.dtype is torch.bool)
            return module(*arguments)

        return counted

    graphs.alter = run
    return found


def test_what_is_chosen_by_size_does_not_bind_the_number_of_rows(
    graphs: Graphs, rows_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU small gradients are joined. GPT-2's graph for up to 24 rows took 22 or more because of this choice."""
    monkeypatch.setattr(gradients, "_JOINS_IN_GRAPHS", {"cpu"})
    width = bundle.SMALL // EXPECTED
    model = nn.Sequential(nn.LayerNorm(width), nn.LayerNorm(width)).double()
    optimizer = private(squares, EXPECTED, model, compile=True)
    for size in (fixed_size(EXPECTED), 3):
        optimizer.zero_grad()
        optimizer.backward(draw(size, width))
    assert len(graphs) == 1
    assert set(rows_run) == {fixed_size(EXPECTED), 3}


def test_how_norms_of_embeddings_are_found_does_not_bind_the_number_of_rows(
    graphs: Graphs, rows_run: list[int]
) -> None:
    """With 256 positions a Gram matrix is chosen for up to 256 rows."""
    optimizer = private(squares, 240, nn.Embedding(5, 2).double(), compile=True)
    for size in (fixed_size(240), 3):
        optimizer.zero_grad()
        optimizer.backward(torch.randint(5, (size, 256)))
    assert len(graphs) == 1
    assert set(rows_run) == {fixed_size(240), 3}
