"""This module computes the norm of every row of a tensor, precisely also for long rows."""

from __future__ import annotations

import torch
from torch import Tensor

from clipgrad.rules.operands import in_memory_order, widen

_LONG_ROW = 1 << 12


def row_norms_squared(tensor: Tensor) -> Tensor:
    """Return the squared L2 norm of every sample, ``[B]``."""
    flat = in_memory_order(tensor)[0].flatten(1) if tensor.dim() > 1 else tensor[:, None]
    dtype = widen(flat[:0]).dtype
    if flat.device.type == "cpu" and flat.shape[1] > _LONG_ROW:
        # On CPU one float32 sum over millions of values is too small by up to 1e-3; a sum of partial sums is not.
        whole = flat.shape[1] - flat.shape[1] % _LONG_ROW
        pieces = flat[:, :whole].unflatten(1, (-1, _LONG_ROW))
        parts = torch.linalg.vector_norm(pieces, dim=2, dtype=dtype)
        rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True, dtype=dtype)
        flat = torch.cat((parts, rest), 1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norms.square()
