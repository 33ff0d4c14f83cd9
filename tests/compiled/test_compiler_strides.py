"""Results of the compiler's operations that have other strides or another dtype than PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from clipgrad.compiled.backend import compile_graph
from clipgrad.compiled.decompositions import DECOMPOSITIONS, attention_in_float64
from tests.nightly import thinned

Function = Callable[..., Any]


def graph_of(function: Function, given: Sequence[Tensor]) -> GraphModule:
    copies = [tensor.clone() for tensor in given]  # the function may write to them
    return make_fx(function, decomposition_table=DECOMPOSITIONS)(*copies)


def as_the_function(function: Function, *given: Tensor) -> None:
    run = compile_graph(graph_of(function, given), "default", given)
    torch.testing.assert_close(list(run(*given)), list(function(*given)))


def cache(x: Tensor) -> Tensor:
    return torch.cat([x.new_empty(0), x], 1)


def layer_norm_gradient(x: Tensor) -> Tensor:
    gradient, *_ = torch.ops.aten.native_layer_norm_backward(
        x, x.contiguous(), [5], x.mean(-1, True), x.var(-1, keepdim=True), None, None, [True, False, False]
    )  # fmt: skip
    found: Tensor = gradient
    return found


def log_softmax_gradient(x: Tensor) -> Tensor:
    return torch.ops.aten._log_softmax_backward_data(x, x.contiguous(), -1, x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation",
    thinned((cache, layer_norm_gradient, log_softmax_gradient), lambda value: value is cache),
)
def test_views_of_tensors_that_lie_otherwise_than_in_the_trace(operation: Function) -> None:
    """The compiler's form of each operation keeps a transposed tensor's strides; PyTorch's returns a contiguous one."""

    def function(x: Tensor) -> list[Tensor]:
        lies = operation(x.transpose(1, 2))
        assert lies.is_contiguous()
        return [lies.view(-1), lies.view(12, 5).sum(0)]

    as_the_function(function, torch.randn(3, 5, 4))


def add(y: Tensor) -> None:
    y.view(-1).add_(1.0)


def add_to_a_view(y: Tensor) -> None:
    y[1:].view(-1).view(-1).add_(1.0)


def add_to_a_list(y: Tensor) -> None:
    torch._foreach_add_([y.view(-1)], 1.0)


def return_by_name(y: Tensor) -> None:
    torch.neg(y.flatten(), out=y.view(-1))


@pytest.mark.parametrize("write", [add, add_to_a_view, add_to_a_list, return_by_name])
def test_a_view_that_is_written_to_is_not_copied(write: Function) -> None:
    """A write to a copy would be lost without a word, so the compiler has to refuse the graph."""

    def function(x: Tensor) -> list[Tensor]:
        y = cache(x.transpose(1, 2))
        write(y)
        return [y, y.view(-1)]

    x = torch.randn(3, 5, 4)
    with pytest.raises(ValueError, match="Cannot view a tensor"):
        compile_graph(graph_of(function, [x]), "default", [x])


def by_stride(y: Tensor) -> Tensor:
    return y.as_strided((5, 2), (2, 3), 20)


def by_stride_copied(y: Tensor) -> Tensor:
    return torch.ops.aten.as_strided_copy(y, (5, 2), (2, 3), 20)


def by_stride_replaced(y: Tensor) -> Tensor:
    return torch.ops.aten.as_strided_scatter(y, y.new_zeros(5, 2), (5, 2), (2, 3), 20)


@pytest.mark.parametrize("read", [by_stride, by_stride_copied, by_stride_replaced])
def test_a_view_whose_memory_is_read_by_stride_is_not_copied(
    read: Callable[[Tensor], Tensor],
) -> None:
    """The copy would hold other elements at these places, so the compiler has to refuse the graph."""

    def function(x: Tensor) -> list[Tensor]:
        y = cache(x.transpose(1, 2))
        return [read(y[1:].view(-1))]

    x = torch.randn(3, 5, 4)
    with pytest.raises(ValueError, match="Cannot view a tensor"):
        compile_graph(graph_of(function, [x]), "default", [x])


def attention_and_gradients(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> list[Tensor]:
    given = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*given, **options)  # type: ignore[arg-type]
    return [output, *torch.autograd.grad(output.square().sum(), given)]


def of_attention(dtype: torch.dtype) -> list[Tensor]:
    query = torch.randn(2, 6, 3, 4, dtype=dtype).transpose(1, 2)
    return [query, *torch.randn(2, 2, 3, 7, 4, dtype=dtype)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", thinned((torch.float64, torch.float32, torch.bfloat16), lambda dtype: dtype.itemsize == 8)
)  # fmt: skip
def test_attention_of_every_dtype(dtype: torch.dtype) -> None:
    """PyTorch 2.11 "expected scalar type Double but found Float" in float64."""
    mask = torch.rand(2, 1, 6, 7) > 0.3
    mask[..., 0] = True

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[Tensor]:
        causal = attention_and_gradients(query, key, value, is_causal=True, scale=0.3)
        return causal + attention_and_gradients(query, key, value, attn_mask=mask)

    as_the_function(function, *of_attention(dtype), mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_float64_is_described_as_it_is(causal: bool, masked: bool) -> None:
    mask = torch.zeros(6, 7, dtype=torch.float64) if masked else None
    given = (*of_attention(torch.float64), 0.0, causal, mask, 0.3)
    torch.library.opcheck(
        attention_in_float64, given, test_utils=("test_schema", "test_faketensor")
    )
    expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *given[:5], attn_mask=mask, scale=0.3
    )
    assert all(map(torch.equal, attention_in_float64(*given), expected))
