"""Add a row of noise to clipped sums and divide them, in one pass over memory where that is possible."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipgrad.kernels.launcher import launcher, passes
from clipgrad.noise.recurrence import compiled_loops, is_plain

if TYPE_CHECKING:
    from clipgrad.kernels.correlated_launch import TritonSums  # Triton is optional

_SMALL = 2**15  # values


def noised(
    sums: list[Tensor], noise: list[Tensor], divisor: float, *, in_place: bool
) -> list[Tensor]:
    """Return ``(sums + noise) / divisor``, rounded after each of the two.

    Args:
        sums: Sums on one device.
        noise: Views of one row of noise, of the same shapes, on the same device.
        divisor: A public constant.
        in_place: Whether the results are written to ``sums``, which stay as they are otherwise.
    """
    kernel = _kernel_for(sums)
    if kernel is not None and all(map(_has_plain_memory, sums)):
        results = sums if in_place else list(map(torch.empty_like, sums))
        kernel.add(sums, noise, divisor, results)
        # Autograd and other users of version counters do not notice a write by address.
        torch.autograd.graph.increment_version([r for r in results if not r.is_inference()])
        return results
    results = sums if in_place else [total.clone() for total in sums]
    add_and_divide(results, noise, divisor)
    return results


def add_and_divide(sums: list[Tensor], noise: list[Tensor], divisor: float) -> None:
    """Compute ``(sums + noise) / divisor`` in place, rounded after each of the two."""
    if any(map(Tensor.is_neg, sums)):  # PyTorch has no operation on lists of these
        for total, row in zip(sums, noise, strict=True):
            total.add_(row).div_(divisor)
        return
    # For small tensors a call of the loop costs more than PyTorch's second pass over memory.
    large = sum(map(Tensor.numel, sums)) > _SMALL * len(sums)
    loops = compiled_loops() if large and all(map(is_plain, sums)) else None
    if loops is None or not all(map(is_plain, noise)):
        torch._foreach_add_(sums, noise)
        torch._foreach_div_(sums, divisor)
        return
    for total, row in zip(sums, noise, strict=True):
        loops.clipgrad_add_and_divide(
            ctypes.c_void_p(total.data_ptr()),
            ctypes.c_void_p(row.data_ptr()),
            ctypes.c_int64(total.numel()),
            ctypes.c_float(divisor),
        )
        torch.autograd.graph.increment_version(total)


def _kernel_for(sums: list[Tensor]) -> TritonSums | None:
    return verified_sums(sums[0].device) if sums and sums[0].device.type == "cuda" else None


def _has_plain_memory(tensor: Tensor) -> bool:
    # The noise of a coordinate follows from that coordinate's past, so values are taken in the order of the shape.
    return tensor.is_contiguous() and not tensor.is_neg()


@cache
def verified_sums(device: torch.device) -> TritonSums | None:
    """Return the kernel for a CUDA device if there is one and it passes its self-test; else warn and return None."""
    module = launcher("correlated_launch")
    if module is None:
        return None
    kernel: TritonSums = module.TritonSums(device)

    def agrees() -> bool:
        with torch.inference_mode(False), torch.no_grad():
            kernel.self_test()
        return True

    return kernel if passes(agrees, "adds correlated noise to sums") else None
