"""Batches of every size share one graph; what is padding contributes exactly nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, clipped_grad
from clipgrad.compiled import fixed_size
from clipgrad.compiled.shape import pad_rows
from tests.compiled.conftest import Graphs
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


def test_optimizer_leaves_room_for_a_poisson_batch(graphs: Graphs) -> None:
    model = nn.Linear(3, 2)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, max_grad_norm=1.0, noise_multiplier=1.0,
        expected_batch_size=16, compile=True,
    )  # fmt: skip
    for size in (16, 0, 24, 25, 7):
        optimizer.backward(torch.randn(size, 3))
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1
    assert fixed_size(16) == 24
    shapes = [n.meta["val"].shape for n in graphs.modules[0].graph.nodes if n.op == "placeholder"]
    assert torch.Size([24, 3]) in shapes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("padded", [False, True])
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
