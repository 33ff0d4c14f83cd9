"""This module computes the norm of every row of a tensor, precisely also for long rows."""

from __future__ import annotations

import torch
from torch import Tensor

from clipgrad._functorch import is_symbol
from clipgrad.rules.operands import in_memory_order, widen

_LONG_ROW = 1 << 12


def row_norms_squared(tensor: Tensor) -> Tensor:
    """Return the squared L2 norm of every sample, ``[B]``."""
    flat = in_memory_order(tensor)[0].flatten(1) if tensor.dim() > 1 else tensor[:, None]
    dtype = widen(flat[:0]).dtype
    # On CPU one float32 sum over millions of values is too small by up to 1e-3; a sum of partial sums is not. For a GPU
    # a compiler divides a long sum by itself, but only if it knows the number of rows (GPT-2: 17 us instead of 57).
    if (flat.device.type == "cpu" or is_symbol(flat.shape[0])) and flat.shape[1] > _LONG_ROW:
        whole = flat.shape[1] - flat.shape[1] % _LONG_ROW
        pieces = flat[:, :whole].unflatten(1, (-1, _LONG_ROW))
        parts = torch.linalg.vector_norm(pieces, dim=2, dtype=dtype)
        if whole < flat.shape[1]:
            rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True, dtype=dtype)
            parts = torch.cat((parts, rest), 1)
        flat = parts
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norms.square()
