"""Run operations on the whole batch for which PyTorch's rules for ``vmap`` would fix lengths that are symbols.

These rules are written in C++ and ask for sizes as numbers. The same operation on the tensor with its batch axis does
not. No result changes: each operation treats the rows of that axis independently, and draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipgrad._functorch import (
    Decline,
    below_vmap,
    current_level,
    current_randomness,
    expose_batch_axis,
    hide_batch_axis,
)
from clipgrad.rules.names import by_all_names, each_name


class WholeBatch(TorchFunctionMode):
    """Inside this mode, concatenation, padding, indexing and dropout run on the whole batch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = _TABLE.get(func)
        if instead is not None and "out" not in kwargs:
            try:
                return instead(*args, **kwargs)
            except Decline:
                pass
        return func(*args, **kwargs)


def _on_batch(tensors: Sequence[Tensor], operation: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return the operation's result on tensors that all have the batch axis in front.

    Raises:
        Decline: If none has it, or one belongs to another transform.
    """
    level = current_level()
    if not level:
        raise Decline
    whole = [expose_batch_axis(tensor, level) for tensor in tensors]
    rows = [tensor.shape[0] for tensor in whole if tensor is not None]
    if not rows:
        raise Decline
    with below_vmap():
        expanded = [
            tensor.expand(rows[0], *tensor.shape) if batched is None else batched
            for tensor, batched in zip(tensors, whole, strict=True)
        ]
        return hide_batch_axis(operation(expanded), level)


def _after_batch(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _cat(tensors: Sequence[Tensor], dim: Any = 0, *, axis: Any = None) -> Tensor:
    dim = dim if axis is None else axis
    if not isinstance(dim, int):
        raise Decline
    # An empty vector has any shape here, by PyTorch's definition. The first cat of a key-value cache has one.
    parts = [tensor for tensor in tensors if not _is_empty_vector(tensor)]
    return _on_batch(parts or list(tensors), lambda whole: torch.cat(whole, _after_batch(dim)))


def _is_empty_vector(tensor: Tensor) -> bool:
    # A symbol is no int, and asking whether it is 0 would fix its value.
    size: object = tensor.shape[0] if tensor.dim() == 1 else None
    return isinstance(size, int) and size == 0


def _pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant":
        raise Decline
    return _on_batch([input], lambda whole: F.pad(whole[0], list(pad), value=value))


def _constant_pad(input: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    return _pad(input, pad, "constant", value)


def _gather(input: Tensor, dim: Any, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    if not isinstance(dim, int) or not input.dim() or not index.dim():
        raise Decline
    return _on_batch([input, index], lambda whole: whole[0].gather(_after_batch(dim), whole[1]))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the input and the other positional arguments; if the input is a keyword, it is taken out."""
    key = next((name for name in ("input", "self") if name in kwargs), None)
    return (args[0], args[1:]) if key is None else (kwargs.pop(key), args)


def _dropout(operation: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Map each name of an operation that drops single elements to the same operation on all samples at once.

    It draws the numbers that ``vmap`` draws if samples get different ones.
    """

    def correct(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_elements(*args: Any, **kwargs: Any) -> Tensor:
            input, rest = _split(args, kwargs)
            in_place = kwargs.get("inplace", rest[2:3] == (True,))
            if in_place or not current_level() or current_randomness() != "different":
                raise Decline
            return _on_batch([input], lambda whole: function(whole[0], *rest, **kwargs))

        return on_elements

    return each_name(operation, correct)


def _over_images(operation: str, axes: int | None) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Map each name of an operation on images to the same operation on all samples at once.

    Args:
        operation: Its name.
        axes: Spatial axes of the image, which may lack a batch axis of its own; None if it always has one.
    """

    def correct(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_images(*args: Any, **kwargs: Any) -> Any:
            input, rest = _split(args, kwargs)
            spatial = input.dim() - 2 if axes is None else axes

            def run(whole: list[Tensor]) -> Tensor:
                leading = whole[0].shape[: -spatial - 1]
                found = function(whole[0].flatten(0, len(leading) - 1), *rest, **kwargs)
                if not isinstance(found, Tensor):
                    raise Decline
                result: Tensor = found.unflatten(0, leading)
                return result

            if spatial < 1 or input.dim() <= spatial:
                raise Decline
            return _on_batch([input], run)

        return on_images

    return each_name(operation, correct)


_POOLS = [
    (f"{kind}_pool{axes}d", axes)
    for kind in ("max", "avg", "adaptive_avg", "lp")
    for axes in (1, 2, 3)
]
_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        name: function
        for operation, function in (
            ("cat", _cat), ("concat", _cat), ("concatenate", _cat), ("pad", _pad),
            ("constant_pad_nd", _constant_pad), ("gather", _gather),
        )
        for name, function in by_all_names(operation, function).items()
    },
    **{
        name: function
        for operation in ("dropout", "alpha_dropout")
        for name, function in _dropout(operation).items()
    },
    **{
        name: function
        for operation, axes in [*_POOLS, ("interpolate", None)]
        for name, function in _over_images(operation, axes).items()
    },
}  # fmt: skip
