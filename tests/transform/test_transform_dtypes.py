"""Half precision, mixed precision, autocast: wide sums whatever the parameters are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.engine.reference import Params, clipped_sum, per_sample_gradients_by_loop
from tests.small_mlp import STRATEGIES, B, close, definition, draw, mlp


def lower(p: Params, x: Tensor) -> Tensor:
    h = F.layer_norm(F.linear(x, p["w"]), (4,), p["g"])
    return (h @ p["v"].t()).float().square().sum()


def small(dtype: torch.dtype, size: int = B) -> tuple[Params, Tensor]:
    p = {"w": draw(4, 3), "g": draw(4), "v": draw(2, 4)}
    return {name: t.to(dtype) for name, t in p.items()}, draw(size, 3).to(dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, strategy: str) -> None:
    p, x = small(dtype)
    result = clipped_grad(lower, max_grad_norm=1.0, performance=Performance(strategy=strategy))(
        p, x
    )
    wide = {name: t.double() for name, t in p.items()}
    sums, norms = definition(wide, x.double(), norm=1.0, fn=lower)
    assert {g.dtype for g in result.grads.values()} == {torch.float32}
    assert result.grad_norms.dtype is torch.float32
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    )
    close({n: g.double() for n, g in result.grads.items()}, sums, **tolerance)
    close(result.grad_norms.double(), norms, **tolerance)


@pytest.mark.parametrize("microbatch", [None, 4])
def test_accumulate_dtype(params: Params, batch: Any, microbatch: int | None) -> None:
    expected = definition(params, *batch, norm=0.5)[0]
    gradient = clipped_grad(
        mlp,
        max_grad_norm=0.5,
        performance=Performance(accumulate_dtype=torch.float32),
        microbatch_size=microbatch,
    )
    assert {g.dtype for g in gradient(params, *batch).grads.values()} == {torch.float32}
    p = {name: t.float() for name, t in params.items()}
    gradient = clipped_grad(
        mlp,
        max_grad_norm=0.5,
        performance=Performance(accumulate_dtype=torch.float64),
        microbatch_size=microbatch,
    )
    result = gradient(p, batch[0].float(), batch[1])
    close(result.grads, expected, rtol=1e-5, atol=1e-6)


def looked_up(p: Params, x: Tensor) -> Tensor:
    return F.embedding(torch.zeros(1, dtype=torch.long), p["w"]) * x


def convolved(p: Params, x: Tensor) -> Tensor:
    return F.conv1d(x.unsqueeze(-1), p["w"].unsqueeze(-1))


# Ways to use a weight of shape (1, 2) whose gradient is the sample.
USES: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "rule": lambda p, x: F.linear(x, p["w"]),
    "view": lambda p, x: x @ p["w"].t(),
    "expression": lambda p, x: x @ (p["w"] * 1.0).t(),
    "fallback": lambda p, x: x * p["w"],
    "fallback of a view": lambda p, x: x * p["w"][0],
    "embedding": looked_up,
    "convolution": convolved,
    "bias": lambda p, x: F.linear(x[:, :1], torch.ones(2, 1, dtype=x.dtype), p["w"][0]) * x,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_sums_are_not_rounded_to_half_precision(
    use: Callable[[Params, Tensor], Tensor], dtype: torch.dtype, poisoned: bool, strategy: str
) -> None:
    """A float16 sum of this batch would overflow, a bfloat16 one would lose the last sample."""
    p, x = {"w": torch.ones(1, 2, dtype=dtype)}, torch.ones(70_001, 2, dtype=dtype)
    if poisoned:
        x[0] = torch.nan
    gradient = clipped_grad(
        lambda p, x: use(p, x).sum().float(),
        max_grad_norm=10.0,
        performance=Performance(strategy=strategy),
    )
    result = gradient(p, x).grads["w"]
    close(result, torch.full((1, 2), 70_000.0 + (not poisoned)))


def test_mixed_dtypes() -> None:
    p = {"a": draw(3), "b": draw(3).float(), "c": draw(2, 3).half()}

    def loss(p: Params, x: Tensor) -> Tensor:
        return (p["a"] * x).sum() * (p["b"].double() * x).sum() + F.linear(
            x.half(), p["c"]
        ).double().sum()

    x = draw(B, 3)
    for groups in (1.0, {"a": 1.0, "b": 1.0, "c": 1.0}):
        result = clipped_grad(loss, max_grad_norm=groups)(p, x)
        assert [g.dtype for g in result.grads.values()] == [
            torch.float64,
            torch.float32,
            torch.float32,
        ]
    gradients = per_sample_gradients_by_loop(loss, p, x)[1]
    close(result.grads["b"], clipped_sum({"b": gradients["b"]}, 1.0)[0]["b"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(strategy: str) -> None:
    """Rules must take part in autocast as the operations themselves do."""
    p = {"w": draw(6, 4), "k": draw(3, 2, 2), "b": draw(3), "v": draw(2, 3)}
    p = {name: t.float() for name, t in p.items()}

    def loss(p: Params, x: Tensor) -> Tensor:
        h = F.conv1d(F.linear(x, p["w"]).view(1, 2, 3), p["k"], p["b"])
        return (h.mean(-1) @ p["v"].t()).float().square().sum()

    x = draw(B, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(
            p, x
        )
    sums, norms = definition(p, x, norm=1.0, fn=loss)
    assert {g.dtype for g in result.grads.values()} == {torch.float32}
    close(result.grad_norms, norms, rtol=0.1, atol=0.1)
    close(result.grads, sums, rtol=0.1, atol=0.1)
