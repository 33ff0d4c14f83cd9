"""Launches the kernel that writes zeros to dropped samples. Needs Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from clipgrad.rules import _selection_kernels as kernels

_BLOCK = 2048
_PROGRAMS = 1024  # enough to fill a device with zeros to write, few enough to cost nothing


def zero_rows_(tensor: Tensor, keep: Tensor) -> bool:
    """Run the kernel, if every sample is one block of memory.

    Args:
        tensor: ``[B, ...]``, floating-point, on a CUDA device.
        keep: Boolean ``[B]``.

    Returns:
        Whether it ran.
    """
    size = tensor[0].numel() if len(tensor) else 0
    if not size:
        return True
    if not _in_blocks(tensor) or size >= 2**31 - _BLOCK * _PROGRAMS or len(tensor) >= 2**31:
        return False
    shares = min(-(-size // _BLOCK), max(1, _PROGRAMS // len(tensor)))
    with torch.cuda.device(tensor.device):
        kernels.zero_rows[(len(tensor), shares)](
            tensor, keep.view(torch.uint8), size, tensor.stride(0), BLOCK=_BLOCK
        )
    return True


def _in_blocks(tensor: Tensor) -> bool:
    """Whether every sample is a block without gaps, and none overlaps another."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return len(tensor) == 1 or tensor.stride(0) >= expected
