"""Run operations on the whole batch for which PyTorch's rules for ``vmap`` would fix lengths that are symbols.

These rules are written in C++ and ask for sizes as numbers. The same operation on the tensor with its batch axis does
not. No result changes: each operation treats the rows of that axis independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipgrad._functorch import Decline, below_vmap, current_level, per_sample, physical
from clipgrad.rules.names import by_all_names


class WholeBatch(TorchFunctionMode):
    """Inside this mode, concatenation, padding and indexing run on the whole batch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = _TABLE.get(func)
        if instead is not None and current_level() and "out" not in kwargs:
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
    whole = [physical(tensor, level) for tensor in tensors]
    rows = [tensor.shape[0] for tensor in whole if tensor is not None]
    if not rows:
        raise Decline
    with below_vmap():
        expanded = [
            tensor.expand(rows[0], *tensor.shape) if batched is None else batched
            for tensor, batched in zip(tensors, whole, strict=True)
        ]
        return per_sample(operation(expanded), level)


def _after_batch(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _cat(tensors: Sequence[Tensor], dim: Any = 0) -> Tensor:
    if not isinstance(dim, int):
        raise Decline
    return _on_batch(list(tensors), lambda whole: torch.cat(whole, _after_batch(dim)))


def _pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant":
        raise Decline
    return _on_batch([input], lambda whole: _padded(whole[0], list(pad), value or 0))


def _constant_pad(input: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    return _pad(input, pad, "constant", value)


def _padded(tensor: Tensor, amounts: list[int], value: float) -> Tensor:
    """Return the padded tensor without PyTorch's own operation, which fixes lengths as well."""
    for number, axis in enumerate(
        range(tensor.dim() - 1, tensor.dim() - 1 - len(amounts) // 2, -1)
    ):
        before, after = amounts[2 * number : 2 * number + 2]
        start = max(0, -before)
        tensor = tensor.narrow(axis, start, tensor.shape[axis] - start - max(0, -after))

        def filled(amount: int, like: Tensor = tensor, axis: int = axis) -> list[Tensor]:
            shape = [*like.shape[:axis], amount, *like.shape[axis + 1 :]]
            return [like.new_full(shape, value)] if amount > 0 else []

        tensor = torch.cat([*filled(before), tensor, *filled(after)], axis)
    return tensor


def _gather(input: Tensor, dim: Any, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    if not isinstance(dim, int) or not input.dim() or not index.dim():
        raise Decline
    return _on_batch([input, index], lambda whole: whole[0].gather(_after_batch(dim), whole[1]))


_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        name: function
        for operation, function in (
            ("cat", _cat), ("concat", _cat), ("concatenate", _cat), ("pad", _pad),
            ("constant_pad_nd", _constant_pad), ("gather", _gather),
        )
        for name, function in by_all_names(operation, function).items()
    }
}  # fmt: skip
