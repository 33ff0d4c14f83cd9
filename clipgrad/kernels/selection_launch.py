"""This module launches the kernel that writes zeros to dropped samples. It needs Triton."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from clipgrad.kernels import selection_kernels as kernels
from clipgrad.kernels.launcher import passes

_BLOCK = 2048
_PROGRAMS = 1024  # enough to use a whole device, and few enough to cost nothing without drops


def zero_rows_(tensor: Tensor, keep: Tensor) -> bool:
    """Run the kernel on a CUDA tensor ``[B, ...]`` if every sample is one block of memory; return whether it ran."""
    size = tensor[0].numel() if len(tensor) else 0
    if not size:
        return True
    if (
        not _usable_on(tensor.device)
        or not _in_blocks(tensor)
        or size >= 2**31 - _BLOCK * _PROGRAMS
        or len(tensor) >= 2**31
    ):
        return False
    _launch(tensor, keep, size)
    return True


def _launch(tensor: Tensor, keep: Tensor, size: int) -> None:
    shares = min(-(-size // _BLOCK), max(1, _PROGRAMS // len(tensor)))
    with torch.cuda.device(tensor.device):
        kernels.zero_rows[(len(tensor), shares)](
            tensor, keep.view(torch.uint8), size, tensor.stride(0), BLOCK=_BLOCK
        )


@cache
def _usable_on(device: torch.device) -> bool:
    return passes(lambda: _passes_self_test(device), f"writes zeros to dropped samples on {device}")


def _passes_self_test(device: torch.device) -> bool:
    """Return whether the kernel writes exactly the expected zeros to a tensor with unused elements around."""
    room = torch.full((4, 3 * _BLOCK), torch.nan, device=device)
    keep = torch.tensor([True, False, False, True], device=device)
    _launch(room[:, :-5], keep, 3 * _BLOCK - 5)
    return bool((room == 0).sum() == 2 * (3 * _BLOCK - 5)) and not room[1:3, :-5].any()


def _in_blocks(tensor: Tensor) -> bool:
    """Return whether every sample is a block without gaps, and no samples overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return len(tensor) == 1 or tensor.stride(0) >= expected
