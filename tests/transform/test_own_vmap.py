"""Operations that bring a ``vmap`` rule of their own: their backward pass would see all samples at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import clipped_grad
from clipgrad.engine.reference import Params
from clipgrad.errors import NotPerSampleError
from tests.small_mlp import B, close, definition, draw


class Unit(torch.autograd.Function):
    """Normalises the gradient that passes, over what the backward pass sees."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm()


class UnitOfAll(Unit):
    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor) -> Any:
        return UnitOfAll.apply(a), in_dims[0]


class UnitOfEach(Unit):
    generate_vmap_rule = True


def test_functions_with_a_vmap_method() -> None:
    """Their rule is not used: their backward pass would see all samples."""
    p, x = {"w": draw(3, 4)}, draw(B, 3)

    def loss(unit: Any) -> Any:
        return lambda p, x: unit.apply(x @ p["w"]).sin().sum()

    definition_of_all = definition(p, x, norm=1.0, fn=loss(UnitOfEach))[0]
    # Its graph runs it for each sample.
    close(clipped_grad(loss(UnitOfAll), max_grad_norm=1.0)(p, x).grads, definition_of_all)
    # Inside a transform of the loss's own nothing else is known than to refuse it.
    with pytest.raises(NotPerSampleError, match=r"vmap method of its own.*generate_vmap"):
        clipped_grad(
            lambda p, x: torch.func.vmap(UnitOfAll.apply)(x @ p["w"]).sum(), max_grad_norm=1.0
        )(p, x)
    result = clipped_grad(loss(UnitOfEach), max_grad_norm=1.0)(p, x)
    close(result.grads, definition(p, x, norm=1.0, fn=loss(UnitOfEach))[0])
    # Where no gradient passes, its backward pass does not run.
    clipped_grad(lambda p, x: (UnitOfAll.apply(x) @ p["w"]).sum(), max_grad_norm=1.0)(p, x)


def test_operations_with_a_vmap_rule() -> None:
    p, x = {"w": draw(3, 4)}, draw(B, 3)

    def unit_of(name: str) -> Any:
        operation = torch.library.custom_op(f"clipgrad_tests::{name}", mutates_args=())(copy_of)
        operation.register_fake(torch.empty_like)
        operation.register_autograd(
            lambda ctx, grad: grad / grad.norm(), setup_context=lambda ctx, inputs, output: None
        )
        return operation

    each, of_all = unit_of("unit_of_each"), unit_of("unit_of_all")
    of_all.register_vmap(lambda info, in_dims, a: (of_all(a), in_dims[0]))
    for call in (of_all, torch.ops.clipgrad_tests.unit_of_all):
        with pytest.raises(NotPerSampleError, match="vmap rule of its own"):
            clipped_grad(lambda p, x, call=call: call(x @ p["w"]).sin().sum(), max_grad_norm=1.0)(
                p, x
            )

    def loss(p: Params, x: Tensor) -> Tensor:
        return each(x @ p["w"]).sin().sum()

    result = clipped_grad(loss, max_grad_norm=1.0)(p, x)
    close(result.grads, definition(p, x, norm=1.0, fn=loss)[0])


def copy_of(a: Tensor) -> Tensor:
    return a.clone()
