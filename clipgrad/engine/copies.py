"""Copy many tensors with one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_DTYPE = attrgetter("dtype")


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of all tensors, with one launch per dtype."""
    dtypes = set(map(_DTYPE, tensors))
    if len(dtypes) == 1:
        return _copies_of_dtype(tensors, *dtypes)
    found = list(tensors)
    for dtype in dtypes:
        members = [index for index, tensor in enumerate(tensors) if tensor.dtype is dtype]
        made = _copies_of_dtype([tensors[index] for index in members], dtype)
        for index, copy in zip(members, made, strict=True):
            found[index] = copy
    return found


def _copies_of_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies of tensors that have the same dtype."""
    if not dtype.is_floating_point:
        return [tensor.clone() for tensor in tensors]
    # Multiplication by one is exact, also for NaN, infinities and the sign of zero.
    return list(torch._foreach_mul(list(tensors), 1.0))
