"""Refuse a loss that reads a tensor of the whole batch from outside, so that each sample would see all others.

A loss gets its sample as an argument. A loop's variable of the same name, or an attribute that holds the batch, is the
tensor of all samples. It often fits by broadcasting, and ``vmap`` takes it for a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from clipgrad.errors import NotPerSampleError

WholeTensors = Mapping[int, Tensor]
"""The tensors of the whole batch that the caller holds, by their ids."""

_HARMLESS: set[Callable[..., Any]] = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "ndim", "is_cuda", "requires_grad")),
    *(getattr(Tensor, name) for name in ("dim", "is_floating_point", "is_complex", "get_device", "__hash__")),
    torch.is_floating_point, torch.is_complex, torch.is_tensor,
}  # fmt: skip


def by_id(tensors: Iterable[Any]) -> dict[int, Tensor]:
    """Return the tensors by their ids, which stay valid as long as the result lives."""
    return {id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}


def is_harmless(function: Callable[..., Any]) -> bool:
    """Return whether a function tells nothing about samples or their number."""
    return function in _HARMLESS


def whole_tensor_error(tensor: Tensor, operation: str) -> NotPerSampleError:
    """Return the error for a loss that reads a tensor of the whole batch."""
    return NotPerSampleError(
        f"{operation} in the loss reads a tensor of shape {tuple(tensor.shape)} that belongs to the whole batch, from "
        "a variable or an attribute outside. Each sample would see all samples, which clipping does not bound. Pass it "
        "to backward, and read it from the arguments of the loss, where it is one sample's."
    )
