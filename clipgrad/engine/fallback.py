"""Correct the operations for which ``vmap`` deviates from the operation's own definition.

An operation that no rule covers runs under ``vmap`` on per-sample copies of its parameters, which is exact. A copy is
an expanded leaf, so autograd itself materialises the per-sample gradient, and most operations need no code here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgrad._functorch import is_broadcast, is_wrapped
from clipgrad.engine.foreign_code import node_of
from clipgrad.engine.one_by_one import one_by_one
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.embedding_definition import (
    aten_embedding,
    dense_embedding_bag,
    embedding,
    embedding_bag,
)
from clipgrad.rules.loss import cross_entropy_by_definition
from clipgrad.rules.names import by_all_names, each_name, names_of
from clipgrad.rules.recurrent.definition import DEFINITIONS


def _by_formula(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Run attention by its formula: fused kernels fail under ``vmap`` (a learned mask on CPU, alignment on CUDA)."""

    def corrected(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **kwargs)

    return corrected


def _not_left_aligned(*args: Any, **kwargs: Any) -> bool:
    """Return False, so that ``nn.TransformerEncoder`` in eval mode avoids a fused path that has no gradients."""
    return False


def _as_strided(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Refuse broadcast inputs: the backward pass averages over elements that share memory, so over samples."""
    if is_broadcast(input):
        raise NotPerSampleError(
            "as_strided is applied to a value that all samples share (a parameter, or rows looked up with ids that are "
            "the same for all), where PyTorch's gradient mixes samples. Use transpose, unfold, reshape or indexing."
        )
    return torch.as_strided(input, *args, **kwargs)


def _as_strided_copy(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _as_strided(input, *args, **kwargs).clone()


def _refused(message: str) -> Callable[..., None]:
    """Return a correction that refuses the operation."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotPerSampleError(message)

    return refuse


# Under ``vmap`` the gradient of as_strided_ is wrong even if samples share no memory. as_strided_scatter has no
# batching rule, and on one row its offset counts from the start of the batch.
_as_strided_in_place = _refused(
    "as_strided_ changes the strides of a tensor in place, and PyTorch's gradient of that is wrong under vmap. Use "
    "transpose, unfold, reshape or indexing."
)
_as_strided_scatter = _refused(
    "as_strided_scatter writes to memory by its address, which has no meaning for one sample. Use slice_scatter, "
    "select_scatter, scatter or index_put."
)
_register_hook = _refused(
    "the loss registers a hook on a tensor. A hook would see the gradients of all samples at once instead of one "
    "sample's. Change the value in the forward pass, or the gradients with pre_clipping_transform."
)


def _roll(input: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """Return a scalar unchanged: under ``vmap`` its only axis is the batch axis, and ``roll`` would roll along it."""
    return input.clone() if input.dim() == 0 else torch.roll(input, shifts, dims)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Use ``slice_scatter``: under ``vmap`` the gradient of ``src`` is counted once per entry of the axis."""
    size = input.shape[dim]
    if not -size <= index < size:
        return torch.select_scatter(input, src, dim, index)  # raises PyTorch's own error
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index % size, index % size + 1)


def _linear_cross_entropy(
    *args: Any, options: Any = None, weight: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Drop ``options``: in chunks the operation reads ``requires_grad``, which is False under ``vmap``."""
    if options is not None and weight is not None and is_wrapped(weight):
        raise NotPerSampleError(
            "linear_cross_entropy with options= gives no gradient to class weights, which differ per sample here. "
            "Leave options= out, or pass weight.detach()."
        )
    return F.linear_cross_entropy(*args, weight=weight, **kwargs)


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Use ``torch.where`` if ``value`` is a tensor: ``vmap`` of torch 2.11 to 2.13 loses the gradient of ``value``."""
    if not isinstance(value, Tensor):
        return torch.index_fill(input, dim, index, value)
    where = torch.zeros(
        input.shape[dim] if input.dim() else 1, dtype=torch.bool, device=input.device
    )
    where = torch.index_fill(where, 0, index, True)
    if input.dim():
        where = where.view(-1, *[1] * (input.dim() - 1 - dim % input.dim()))
    else:
        where = where.squeeze()
    return torch.where(where, value.to(input.dtype), input)


def _index_fill_in_place(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return input.index_fill_(dim, index, value)
    return input.copy_(_index_fill(input, dim, index, value))


def _one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run an operation whose batching rule is wrong on one sample after the other."""

    def corrected(*args: Any, **kwargs: Any) -> Any:
        return one_by_one(function, args, kwargs)

    return corrected


def _with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Convert tensor arguments (lengths, positions) to numbers, and refuse tensors that differ between samples."""

    def number(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if is_wrapped(value):
            raise NotPerSampleError(
                f"{function.__name__} takes from a per-sample tensor where to cut, so shapes or positions depend on "
                "the data. Use Python numbers, or torch.gather with computed indices."
            )
        return value.tolist()

    def corrected(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        numbers = {key: number(value) for key, value in kwargs.items()}
        if "tensor_indices_or_sections" in numbers:
            numbers["indices_or_sections"] = numbers.pop("tensor_indices_or_sections")
        return function(input, *map(number, args), **numbers)

    return corrected


def _layer_norm(layer_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a normalized_shape with more axes than a sample: ``vmap`` would normalise over other samples as well."""

    def corrected(input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        shape = tuple(normalized_shape)
        if len(shape) > input.dim():
            raise NotPerSampleError(
                f"layer_norm over normalized_shape={shape} reaches past one sample, whose input has shape "
                f"{tuple(input.shape)}. Normalise over axes of one sample."
            )
        return layer_norm(input, normalized_shape, *args, **kwargs)

    return corrected


# If only one operand differs per sample, the batching rule of linalg.solve in torch 2.11 to 2.13 treats a matrix of
# right sides as a vector, or adds an axis. tensorsolve calls solve in C++, where the capture does not see the call.
_SOLVERS = ("linalg_solve", "linalg_solve_ex", "_linalg_solve_ex", "linalg_tensorsolve")

CORRECTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(
    {
        **DEFINITIONS,
        F.cross_entropy: cross_entropy_by_definition,
        **by_all_names("embedding", aten_embedding),
        F.embedding: embedding,
        **each_name("embedding_bag", dense_embedding_bag),
        **each_name("_embedding_bag", dense_embedding_bag),
        F.embedding_bag: embedding_bag,
        **each_name("scaled_dot_product_attention", _by_formula),
        **each_name("multi_head_attention_forward", _by_formula),
        **each_name("layer_norm", _layer_norm),
        **each_name("native_layer_norm", _layer_norm),
        **dict.fromkeys(names_of("_nested_tensor_from_mask_left_aligned"), _not_left_aligned),
        **by_all_names("as_strided", _as_strided),
        **by_all_names("as_strided_copy", _as_strided_copy),
        **by_all_names("as_strided_", _as_strided_in_place),
        **by_all_names("as_strided_scatter", _as_strided_scatter),
        **by_all_names("select_scatter", _select_scatter),
        **by_all_names("roll", _roll),
        **by_all_names("index_fill", _index_fill),
        **by_all_names("index_fill_", _index_fill_in_place),
        **{name: made for op in _SOLVERS for name, made in each_name(op, _one_by_one).items()},
        **each_name("narrow", _with_numbers),
        **each_name("tensor_split", _with_numbers),
        **each_name("linear_cross_entropy", lambda function: _linear_cross_entropy),
        torch.Tensor.register_hook: _register_hook,
        torch.Tensor.grad_fn.__get__: node_of,  # type: ignore[union-attr]
    }
)
