"""A small model as a function of its parameters, and what the definition says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.engine.reference import Params, clipped_sum, per_sample_gradients_by_loop
from clipgrad.result import ClippedGradResult

B, INPUTS, HIDDEN = 6, 4, 3
STRATEGIES = ("auto", "kept", "ghost")
RESULTS = ("grads", "values", "grad_norms", "aux", "batch_size", "num_clipped", "num_nonfinite")
close = torch.testing.assert_close


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_params() -> Params:
    torch.manual_seed(0)
    return {
        "in.w": draw(HIDDEN, INPUTS),
        "in.b": draw(HIDDEN),
        "out.w": draw(2, HIDDEN),
        "gain": draw(()),
    }


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return draw(B, INPUTS), torch.randint(2, (B,))


def mlp(p: Params, x: Tensor, y: Tensor) -> Tensor:
    h = F.linear(x, p["in.w"], p["in.b"]).tanh() * p["gain"]
    return F.cross_entropy(F.linear(h, p["out.w"]), y)


def definition(
    p: Params, *batch: Any, norm: float, fn: Callable[..., Tensor] = mlp
) -> tuple[Params, Tensor]:
    """The clipped sum and the norms."""
    return clipped_sum(per_sample_gradients_by_loop(fn, p, *batch)[1], norm)


def median_norm(p: Params, *batch: Any, fn: Callable[..., Tensor] = mlp) -> float:
    """A clipping norm for which half of the samples are clipped, and no sample is on the edge."""
    return 1.001 * float(definition(p, *batch, norm=1.0, fn=fn)[1].median())


def assert_same(actual: ClippedGradResult, expected: ClippedGradResult) -> None:
    for name in RESULTS:
        close(getattr(actual, name), getattr(expected, name), msg=name)
