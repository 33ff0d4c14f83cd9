"""Scales and shifts by a parameter: exact without a rule of their own.

A rule was tried and left out. The expanded leaf already costs one product and one sum over positions, which is all
that a rule could do; calling the rule made every other product and sum of a model slower.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import clipgrad
from clipgrad import Performance
from clipgrad.engine import reference

CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "x * w": (lambda x, w: x * w, (4,)),
    "w * x": (lambda x, w: w * x, (4,)),
    "x / w": (lambda x, w: x / w, (4,)),
    "w / x": (lambda x, w: w / x, (4,)),
    "x + w": (lambda x, w: x + w, (4,)),
    "w - x": (lambda x, w: w - x, (4,)),
    "x - w": (lambda x, w: x - w, (4,)),
    "add with alpha": (lambda x, w: torch.add(x, w, alpha=3), (4,)),
    "sub with alpha": (lambda x, w: torch.sub(w, x, alpha=3), (4,)),
    "rounded quotient": (lambda x, w: x * w + torch.div(x, w, rounding_mode="floor"), (4,)),
    "in place": (lambda x, w: (x * 1).mul_(w).add_(w), (4,)),
    "a scalar": (lambda x, w: x * w + w, ()),
    "one number": (lambda x, w: x * w + w, (1,)),
    "a value per position": (lambda x, w: x * w + w, (3, 1)),
    "a value per position and channel": (lambda x, w: x * w + w, (3, 4)),
    "more axes than the input": (lambda x, w: x * w + w, (2, 1, 3, 4)),
    "the input is broadcast": (lambda x, w: x[..., :1] * w + w, (3, 4)),
    "an input of integers": (lambda x, w: x.round().long() * w, (4,)),
    "other dtype": (lambda x, w: x.float() * w, (4,)),
    "used twice": (lambda x, w: ((x * w).tanh() + w) * w, (4,)),
    "scale squared": (lambda x, w: x * w * w + w * w, (4,)),
    "multiply-add": (lambda x, w: torch.addcmul(w, x, w, value=2), (4,)),
    "interpolation": (lambda x, w: torch.lerp(x, x.square(), w), (4,)),
    "RMS norm by hand": (
        lambda x, w: w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
        (4,),
    ),
}


@pytest.mark.parametrize("strategy", ["auto", "kept", "ghost"])
@pytest.mark.parametrize(("forward", "shape"), CASES.values(), ids=CASES)
def test_equals_the_definition(
    forward: Callable[..., Tensor], shape: tuple[int, ...], strategy: str
) -> None:
    torch.manual_seed(0)
    params = {"w": 0.5 + torch.rand(shape, dtype=torch.float64)}
    x, target = 1 + torch.rand(2, 5, 3, 4, dtype=torch.float64)

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return ((forward(x, params["w"]) - target).sin() * target.exp()).sum()

    losses, each = reference.per_sample_gradients_by_loop(loss, params, x, target)
    expected, norms = reference.clipped_sum(each, 3.0)
    for microbatch_size in (1, 3, None):
        result = clipgrad.clipped_grad(
            loss,
            max_grad_norm=3.0,
            performance=Performance(strategy=strategy),
            microbatch_size=microbatch_size,
        )(params, x, target)
        torch.testing.assert_close(result.values, losses, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(result.grad_norms, norms, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(result.grads["w"], expected["w"], atol=1e-9, rtol=1e-9)
