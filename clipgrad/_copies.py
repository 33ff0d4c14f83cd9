"""Copies of many tensors at the price of one launch, or of none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

_DTYPE = attrgetter("dtype")
# Not CUDA's: its fused and foreach kernels write to addresses that they ask for as if to read (PyTorch 2.11 to 2.13).
_COPIES_ON_WRITE = {"cpu"}


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all tensors, with a launch for each dtype and not for each tensor."""
    dtypes = set(map(_DTYPE, tensors))
    if len(dtypes) == 1:
        return _alike(tensors, *dtypes)
    found = list(tensors)
    for dtype in dtypes:
        members = [index for index, tensor in enumerate(tensors) if tensor.dtype is dtype]
        made = _alike([tensors[index] for index in members], dtype)
        for index, copy in zip(members, made, strict=True):
            found[index] = copy
    return found


def _alike(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of tensors of one dtype."""
    if not dtype.is_floating_point:
        return [tensor.clone() for tensor in tensors]
    # Times one is the value itself, NaN, infinities and the sign of zero included.
    return list(torch._foreach_mul(list(tensors), 1.0))


def copies_once_written(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that cost time and memory only if somebody writes to one of the two, by whatever way.

    PyTorch copies on write: whoever asks for an address that may be written to, NumPy or a kernel too, gets memory of
    its own first, unless the other tensor is gone by then.
    """
    lazy: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
    if lazy is None or any(tensor.device.type not in _COPIES_ON_WRITE for tensor in tensors):
        return copies(tensors)
    try:
        return [lazy(tensor) for tensor in tensors]
    except RuntimeError:  # memory that is not PyTorch's own
        return copies(tensors)
