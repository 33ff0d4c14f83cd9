"""This module has what rules and norms do with their operands: dtypes, memory order, scaled rows and short sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipgrad.kernels.half_products import HALF
from clipgrad.kernels.selection import reshape_to_broadcast

_LOWERED = (torch.float32, *HALF)  # autocast leaves float64 alone


def widen(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, because norms and sums of half-precision factors cancel."""
    return tensor.float() if tensor.dtype in HALF else tensor


def lowered(tensor: Tensor) -> Tensor:
    """Return an operand as autocast rounds it for a product, so that a rule records what is multiplied.

    This is for operations that autocast lowers on every device: ``linear``, ``matmul``, ``addmm``, convolutions.
    """
    # Mostly there is no autocast, and asking for the device takes a microsecond more.
    if not torch._C._is_any_autocast_enabled():
        return tensor
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype not in _LOWERED:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def scale_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """Return ``tensor[b, ...] * factors[b]``."""
    return tensor * reshape_to_broadcast(factors.to(tensor.dtype), tensor)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or more tensors; a single tensor is not copied."""
    return sum(tensors[1:], start=tensors[0])


def in_memory_order(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Return the tensor with all axes but the first in memory order, and the original index of each of these axes.

    An operation reads a dense tensor sequentially in this order, and flattening it copies nothing.
    """
    axes = list(range(1, tensor.dim()))
    if not tensor.is_contiguous():
        axes.sort(key=tensor.stride, reverse=True)
    return tensor.permute(0, *axes), axes
