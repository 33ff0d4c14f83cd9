"""Run an operation on one sample after the other, below ``vmap``.

This is slow and exact. It is for operations whose batching rule in PyTorch is wrong or missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from clipgrad._functorch import (
    Decline,
    below_vmap,
    current_level,
    expose_batch_axis,
    hide_batch_axis,
    is_wrapped,
)
from clipgrad.engine.error_messages import is_refusal
from clipgrad.engine.expressions import writes_in_place, writes_to_first
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.errors import NotPerSampleError

_is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


def one_by_one(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on each sample alone, with autograd, and stack the results.

    Raises:
        NotPerSampleError: Inside another ``torch.func`` transform, where single samples cannot be extracted; or if
            results differ in structure, shape or dtype between samples, or share memory with an operand.
    """
    level = current_level()
    name = resolve_name(function) or getattr(function, "__name__", str(function))
    flat, structure = tree_flatten((tuple(args), dict(kwargs)))
    try:
        whole = [
            expose_batch_axis(leaf, level) if isinstance(leaf, Tensor) else None for leaf in flat
        ]
    except Decline:
        raise NotPerSampleError(
            f"{name} has no correct batching rule in PyTorch, so it runs on one sample after the other. Inside another "
            "torch.func transform (grad, vmap, jvp) it cannot do so. Write it with elementary operations there."
        ) from None
    size = next((value.shape[0] for value in whole if value is not None), None)
    if size is None:
        return function(*args, **kwargs)
    with below_vmap():
        rows = [None if value is None else value.unbind(0) for value in whole]
        results = []
        for index in range(size):
            sample = [
                leaf if row is None else row[index] for leaf, row in zip(flat, rows, strict=True)
            ]
            own_args, own_kwargs = tree_unflatten(sample, structure)
            results.append(function(*own_args, **own_kwargs))
        return _stack_results(
            name, results, [leaf for leaf in flat if isinstance(leaf, Tensor)], level
        )


def _stack_results(
    name: str, results: Sequence[Any], operands: Sequence[Tensor], level: int
) -> Any:
    flats, structures = zip(*map(tree_flatten, results), strict=True)
    if any(structure != structures[0] for structure in structures):
        raise _different_results_error(name)
    memory = [_without_vmap(operand, level) for operand in operands]
    outputs: list[Any] = []
    for column in zip(*flats, strict=True):
        first = column[0]
        if not isinstance(first, Tensor):
            if any(value != first for value in column):
                raise _different_results_error(name)
            outputs.append(first)
            continue
        if any(value.shape != first.shape or value.dtype != first.dtype for value in column):
            raise _different_results_error(name)
        if first.numel() and any(_is_alias_of(first, operand) for operand in memory):
            raise NotPerSampleError(
                f"{name} returns a view of its operand, which PyTorch's vmap cannot batch. Use indexing, reshape or "
                "transpose with Python numbers."
            )
        outputs.append(hide_batch_axis(torch.stack(column), level))
    return tree_unflatten(outputs, structures[0])


def _without_vmap(tensor: Tensor, level: int) -> Tensor:
    value = expose_batch_axis(tensor, level)
    return tensor if value is None else value


def _different_results_error(name: str) -> NotPerSampleError:
    return NotPerSampleError(
        f"{name} returns results of different shapes for different samples (data-dependent shapes). Use a mask of "
        "fixed shape and torch.where."
    )


def retry_one_by_one(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], error: Exception
) -> Any:
    """Run an operation that failed under ``vmap`` on single samples, or raise its error again.

    An operation can fail because its batching rule is missing, because its kernel takes no broadcast memory, or because
    it is a Python function that computes with shapes.
    """
    if isinstance(error, NotPerSampleError) or is_refusal(error):
        raise error
    if writes_to_first(function) or writes_in_place(function, args, kwargs):
        raise error
    schema = getattr(function, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise error
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    if not any(map(is_wrapped, tensors)):
        raise error
    before = [tensor._version for tensor in tensors]
    rng_state = SavedRngState(tensors[0].device)
    try:
        result = one_by_one(function, args, kwargs)
    except Exception:
        raise error from None
    # The loss could branch on a Python value computed from data. Random numbers would ignore the randomness= option.
    # A write would happen once per sample.
    only_tensors = all(isinstance(leaf, Tensor) for leaf in tree_flatten(result)[0])
    written = before != [tensor._version for tensor in tensors]
    if not only_tensors or written or rng_state.changed():
        raise error
    return result
