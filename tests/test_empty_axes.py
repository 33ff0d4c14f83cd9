"""Axes without elements: a sequence of no steps, a layer of no inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from tests.small_mlp import STRATEGIES, Params, close, definition, draw, median_norm


def cell(p: Params, x: Tensor) -> Tensor:
    return torch.gru_cell(x, p["b"].expand(1, 2), p["w"], p["u"])


def layer(p: Params, x: Tensor) -> Tensor:
    state = x.new_zeros(1, 1, 2)
    return torch.lstm(
        x, (state, state), [p["w"], p["u"]], False, 1, 0.0, False, False, batch_first=True
    )[0]


Case = tuple[Callable[[Params, Tensor], Tensor], dict[str, tuple[int, ...]], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (4, 2), "b": (4,)}, (0, 2)),
    "linear without inputs": (
        lambda p, x: F.linear(x, p["w"], p["b"]),
        {"w": (4, 0), "b": (4,)},
        (3, 0),
    ),
    "matrix product": (lambda p, x: x @ p["w"], {"w": (2, 4)}, (0, 2)),
    "product from the left": (lambda p, x: p["w"] @ x, {"w": (4, 0)}, (0, 2)),
    "bmm": (lambda p, x: torch.bmm(x, p["w"]), {"w": (1, 3, 2)}, (0, 3)),
    "einsum": (lambda p, x: torch.einsum("bti,io->bto", x, p["w"]), {"w": (3, 2)}, (0, 3)),
    "einsum with groups": (
        lambda p, x: torch.einsum("bgi,gio->bgo", x, p["w"]),
        {"w": (2, 0, 3)},
        (2, 0),
    ),
    "cell": (cell, {"w": (6, 0), "u": (6, 2), "b": (1, 2)}, (0,)),
    "recurrent layer": (layer, {"w": (8, 0), "u": (8, 2)}, (3, 0)),
    "layer norm": (lambda p, x: F.layer_norm(x, (3,), p["w"]), {"w": (3,)}, (0, 3)),
    "layer norm of no rows": (
        lambda p, x: F.layer_norm(x, (0, 3), p["w"], p["b"]),
        {"w": (0, 3), "b": (0, 3)},
        (0, 3),
    ),
    "rms norm of no rows": (lambda p, x: F.rms_norm(x, (0, 3), p["w"]), {"w": (0, 3)}, (0, 3)),
    "batch norm of no positions": (
        lambda p, x: F.batch_norm(x, x.new_zeros(3), x.new_ones(3), p["w"], p["b"]),
        {"w": (3,), "b": (3,)},
        (3, 0),
    ),
    "heads": (
        lambda p, x: F.multi_head_attention_forward(
            x.transpose(0, 1),
            x.transpose(0, 1),
            x.transpose(0, 1),
            4,
            2,
            p["in"],
            p["b"],
            None,
            None,
            False,
            0.0,
            p["out"],
            p["c"],
            need_weights=False,
        )[0],
        {"in": (12, 4), "b": (12,), "out": (4, 4), "c": (4,)},
        (0, 4),
    ),
    "embedding": (lambda p, x: F.embedding(x.long(), p["w"]), {"w": (3, 2)}, (0,)),
    "attention": (
        lambda p, x: F.scaled_dot_product_attention(x @ p["w"], x @ p["w"], x),
        {"w": (3, 3)},
        (0, 3),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_loop(case: Case, strategy: str) -> None:
    forward, shapes, shape = case
    torch.manual_seed(0)
    params = {name: draw(*size) for name, size in {**shapes, "other": (2,)}.items()}
    batch = draw(4, *shape), draw(4, 2)

    def loss(p: Params, x: Tensor, y: Tensor) -> Any:
        return forward(p, x).sin().sum() + (p["other"] * y).sum()

    norm = median_norm(params, *batch, fn=loss)
    sums, norms = definition(params, *batch, norm=norm, fn=loss)
    for microbatch_size in (None, 3):
        gradient = clipped_grad(
            loss,
            max_grad_norm=norm,
            performance=Performance(strategy=strategy),
            microbatch_size=microbatch_size,
        )
        result = gradient(params, *batch)
        close(result.grad_norms, norms, rtol=1e-9, atol=1e-9)
        close(result.grads, sums, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_parameter_without_elements_where_the_gradient_is_nan(strategy: str) -> None:
    """Its gradient is nothing, whatever its factors hold; found by random programs."""

    def loss(p: Params, x: Tensor) -> Tensor:
        h = F.linear(x, p["w"])
        return h.square().sum().sqrt()  # of zero: infinite times zero

    params, batch = {"w": draw(2, 0)}, (draw(4, 3, 0),)
    result = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(
        params, *batch
    )
    close(result.grad_norms, torch.zeros(4, dtype=torch.float64))
    assert result.num_nonfinite == 0
