"""Sums over the positions of an activation's gradient are operations of their own in a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.compiled import position_sums
from clipgrad.compiled.decompositions import _ACTIVATIONS, DECOMPOSITIONS
from tests.compiled.conftest import Graphs, norms_of_equal_sums
from tests.nightly import every

close = torch.testing.assert_close
Params = dict[str, Tensor]
BATCH, POSITIONS, WIDTH, HIDDEN = 4, 6, 3, 5


@pytest.fixture(autouse=True)
def small_sums_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_sums, "_DEVICES", {"cpu"})
    monkeypatch.setattr(position_sums, "_FEWEST_ELEMENTS", 1)
    for operation in _ACTIVATIONS:  # graphs for the CPU have these in another form
        monkeypatch.delitem(DECOMPOSITIONS, operation)


def as_written_in_gpt2(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * x.pow(3))))


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gpt2": as_written_in_gpt2,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": F.relu}


def loss_with(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def loss(p: Params, x: Tensor) -> Tensor:
        hidden = activation(F.linear(x, p["in"], p["bias"]))
        return F.linear(hidden, p["out"], p["last"]).square().sum()

    return loss


def made(dtype: torch.dtype) -> tuple[Params, Tensor]:
    params = {
        "in": torch.randn(HIDDEN, WIDTH, dtype=dtype),
        "bias": torch.randn(HIDDEN, dtype=dtype),
        "out": torch.randn(2, HIDDEN, dtype=dtype),
        "last": torch.randn(2, dtype=dtype),
    }
    return params, torch.randn(BATCH, POSITIONS, WIDTH, dtype=dtype)


def clipped_in_graph(loss: Callable[..., Tensor], *given: Any, **options: Any) -> Any:
    """Batches of one size, as on a GPU."""
    return clipped_grad(loss, max_grad_norm=0.5, compile=True, microbatch_size=BATCH, **options)(
        *given
    )


def sums_apart(graphs: Graphs) -> int:
    (module,) = graphs.modules
    targets = [str(node.target) for node in module.graph.nodes]
    return targets.count("clipgrad.sum_over_positions.default")


@pytest.mark.parametrize("name", every(3, [*APART, *TOGETHER]))
@pytest.mark.parametrize("strategy", ["auto", "ghost", "kept"])
def test_exact(name: str, strategy: Any, graphs: Graphs) -> None:
    loss = loss_with({**APART, **TOGETHER}[name])
    params, x = made(torch.float64)
    found = clipped_in_graph(loss, params, x, performance=Performance(strategy=strategy))
    close(found.grad_norms, norms_of_equal_sums(found, loss, 0.5, params, x))
    assert sums_apart(graphs) == (name in APART)


def test_samples_stay_apart(graphs: Graphs) -> None:
    loss = loss_with(F.gelu)
    params, x = made(torch.float64)
    x[1, 0, 0] = torch.nan
    found = clipped_in_graph(loss, params, x)
    rest = x[[0, 2, 3]]
    assert found.num_nonfinite == 1
    norms_of_equal_sums(found, loss, 0.5, params, rest)


def test_half_precision_is_summed_in_float32(graphs: Graphs) -> None:
    rows = torch.full((2 * 4096, 3), 1.0, dtype=torch.bfloat16)
    found = position_sums.sum_over_positions(rows, 2)
    assert found.dtype is torch.float32
    assert torch.equal(found, torch.full((2, 3), 4096.0))


def test_one_position_has_no_sum(graphs: Graphs) -> None:
    loss = loss_with(F.gelu)
    params, x = made(torch.float64)
    clipped_in_graph(loss, params, x[:, 0])
    assert sums_apart(graphs) == 0


def test_a_small_sum_is_left_to_the_compiler(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(position_sums, "_FEWEST_ELEMENTS", BATCH * POSITIONS * HIDDEN + 1)
    params, x = made(torch.float64)
    clipped_in_graph(loss_with(F.gelu), params, x)
    assert sums_apart(graphs) == 0


def test_two_graphs_serve_all_lengths(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them have fewer elements than what is summed apart."""
    monkeypatch.setattr(position_sums, "_FEWEST_ELEMENTS", BATCH * 10 * HIDDEN)
    loss = loss_with(F.gelu)
    params, _ = made(torch.float64)
    gradient = clipped_grad(loss, max_grad_norm=0.5, compile=True, microbatch_size=BATCH)
    for length in (15, 12, 11, 9, 7, 5):
        x = torch.randn(BATCH, length, WIDTH, dtype=torch.float64)
        found = gradient(params, x)
        norms_of_equal_sums(found, loss, 0.5, params, x)
    assert len(graphs) == 2
