"""Samples that must not count: padded ones, those that are not finite, none at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.engine.reference import Params
from tests.small_mlp import INPUTS, STRATEGIES, B, close, definition, draw, median_norm, mlp


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("microbatch", [None, 1, 4])
@pytest.mark.parametrize("nan_safe", [True, False])
def test_padding(
    params: Params, batch: Any, microbatch: int | None, strategy: str, nan_safe: bool
) -> None:
    mask = torch.tensor([False, True, False, False, True, True])
    norm = median_norm(params, *batch)
    gradient = clipped_grad(
        mlp,
        max_grad_norm=norm,
        microbatch_size=microbatch,
        performance=Performance(strategy=strategy),
        nan_safe=nan_safe,
    )
    result = gradient(params, *batch, is_padding=mask)
    rows = [leaf[~mask] for leaf in batch]
    sums, norms = definition(params, *rows, norm=norm)
    close(result.grads, sums)
    assert (result.batch_size, int(result.num_clipped)) == (3, int((norms > norm).sum()))
    for junk in (torch.nan, torch.inf, 0.0, 1e200):
        x = torch.where(mask[:, None], junk, batch[0])
        again = gradient(params, x, batch[1], is_padding=mask)
        close(again.grads, result.grads, rtol=0 if junk == 0 else 1e-12, atol=1e-15)
        assert int(again.num_nonfinite) == 0


def test_all_padded(params: Params, batch: Any) -> None:
    result = clipped_grad(mlp, max_grad_norm=1.0)(
        params, *batch, is_padding=torch.ones(B, dtype=torch.bool)
    )
    assert (result.batch_size, int(result.num_clipped)) == (0, 0)
    assert not any(g.any() for g in result.grads.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("microbatch", [None, 1, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_samples_that_are_not_finite(
    params: Params, batch: Any, value: float, microbatch: int | None, strategy: str
) -> None:
    x, y = batch
    x[1, 2] = x[4, 0] = value
    w = {**params, "gain": params["gain"] / 2}

    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            F.linear(F.linear(x, p["in.w"], p["in.b"]) * p["gain"], p["out.w"]), y
        )

    norm = median_norm(w, x[[0, 2, 3, 5]], y[[0, 2, 3, 5]], fn=loss)
    result = clipped_grad(
        loss,
        max_grad_norm=norm,
        microbatch_size=microbatch,
        performance=Performance(strategy=strategy),
    )(w, x, y)
    close(result.grads, definition(w, x[[0, 2, 3, 5]], y[[0, 2, 3, 5]], norm=norm, fn=loss)[0])
    assert (int(result.num_nonfinite), result.batch_size) == (2, B)


def test_not_nan_safe(params: Params, batch: Any) -> None:
    batch[0][1] = torch.nan
    gradient = clipped_grad(mlp, max_grad_norm=1.0, nan_safe=False)
    for mask in (None, torch.arange(B) == 3):  # padding drops samples, but not this one
        grads = gradient(params, *batch, is_padding=mask).grads
        assert all(g.isnan().all() for g in grads.values())
    assert gradient.sensitivity() == math.inf


def test_empty_batch(params: Params) -> None:
    empty = draw(0, INPUTS), torch.zeros(0, dtype=torch.long)
    gradient = clipped_grad(
        mlp,
        max_grad_norm={"in": 1.0, "": 2.0},
        performance=Performance(accumulate_dtype=torch.float32),
    )
    result = gradient(params, *empty, is_padding=torch.zeros(0, dtype=torch.bool))
    assert {n: (g.shape, g.dtype) for n, g in result.grads.items()} == {
        n: (p.shape, torch.float32) for n, p in params.items()
    }
    assert not any(g.any() for g in result.grads.values())
    assert (result.batch_size, int(result.num_clipped), int(result.num_nonfinite)) == (0, 0, 0)
    assert {n: v.shape for n, v in result.grad_norms.items()} == {"in": (0,), "": (0,)}
