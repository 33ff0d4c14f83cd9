"""A loss that branches on values of the data is refused with its line; written with torch.where it is exact."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import clipped_grad
from clipgrad.errors import CompileError, NotPerSampleError

Params = dict[str, Tensor]
Loss = Callable[..., Any]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def params() -> Params:
    torch.manual_seed(0)
    return {"w": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 4, dtype=torch.float64)


def linear(params: Params, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, params["w"], params["b"])


def branch(params: Params, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return linear(params, x).sin().sum()
    return linear(params, x).square().mean()


def nested(params: Params, x: Tensor) -> Tensor:
    y = linear(params, x)
    if x[0, 0] > 0:
        y = y * 2 if (y > 0).all() else y.cos()
    return y.sum() if bool(y.sum() > 0) else y.square().sum()


def item(params: Params, x: Tensor) -> Tensor:
    return linear(params, x).sin().sum() * x.sum().item() + int(x[0, 0] > 0)


def steps(params: Params, x: Tensor) -> Tensor:
    y = x
    for _ in range(int(x.abs().sum())):
        y = y * 0.9
    return linear(params, y).sin().sum()


def contains(params: Params, x: Tensor) -> Tensor:
    y = linear(params, x).sin().sum()
    return 3 * y if 1 in (x > 1).long() else y


REFUSED = [branch, nested, item, steps, contains]


def by_loop(params: Params, loss: Loss, x: Tensor, bound: float) -> tuple[Params, Tensor, Tensor]:
    """Clipped sums, norms and losses, one sample at a time."""
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    norms, values = [], []
    for i in range(len(x)):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        value = loss(leaves, x[i : i + 1])
        found = torch.autograd.grad(value, list(leaves.values()))
        norm = torch.cat([g.flatten() for g in found]).norm()
        for name, g in zip(leaves, found, strict=True):
            sums[name] += g * min(1.0, bound / float(norm))
        norms.append(norm)
        values.append(value.detach())
    return sums, torch.stack(norms), torch.stack(values)


@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("loss", REFUSED)
def test_refused_with_its_line(
    params: Params, x: Tensor, loss: Loss, microbatch_size: int | None
) -> None:
    lines, first = inspect.getsourcelines(loss)
    with pytest.raises(NotPerSampleError, match=r"torch\.where") as caught:
        clipped_grad(loss, max_grad_norm=1.0, microbatch_size=microbatch_size)(params, x)
    line = re.search(r"test_branches\.py:(\d+)", str(caught.value))
    assert line is not None
    assert first < int(line.group(1)) < first + len(lines)


def test_a_graph_refuses_it_too(params: Params, x: Tensor) -> None:
    with pytest.raises(CompileError, match=r"branching.*test_branches\.py:\d+"):
        clipped_grad(branch, max_grad_norm=1.0, compile=True)(params, x)


def test_explain_refuses_it_too(params: Params, x: Tensor) -> None:
    with pytest.raises(NotPerSampleError, match=r"torch\.where.*test_branches\.py:\d+"):
        clipped_grad(branch, max_grad_norm=1.0).explain(params, x)


def test_the_remedy_is_exact(params: Params, x: Tensor) -> None:
    def where(params: Params, x: Tensor) -> Tensor:
        y = linear(params, x)
        return torch.where(x.sum() > 0, y.sin().sum(), y.square().mean())

    bound = float(by_loop(params, branch, x, 1.0)[1].median())
    sums, norms, values = by_loop(params, branch, x, bound)
    result = clipped_grad(where, max_grad_norm=bound)(params, x)
    torch.testing.assert_close(result.values, values, **TOLERANCE)
    torch.testing.assert_close(result.grad_norms, norms, **TOLERANCE)
    for name in params:
        torch.testing.assert_close(result.grads[name], sums[name], **TOLERANCE)
