"""Sum large per-sample gradients that lie in memory, times one factor per sample.

On a GPU such a sum only has to read the gradients once. TorchInductor's loop over the samples reads them at a third of
the memory's speed, and cuBLAS's product of one row at a tenth, so there a kernel of our own does it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.kernels.launcher import launcher
from clipgrad.kernels.selection import select_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = {"cuda"}  # tests add the CPU, where the operation runs without the kernel
# A smaller sum costs no more than its launch, and a compiler fuses it with its neighbours.
_FEWEST_ELEMENTS = 1 << 16


def sums_rows(gradients: Tensor) -> bool:
    """Return whether ``weighted_sum`` is for these gradients, ``[B, *shape]``."""
    large = gradients.shape[1:].numel() >= _FEWEST_ELEMENTS
    return large and gradients.device.type in _DEVICES and gradients.dtype in _DTYPES


def weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """Return ``sum_b factors[b] * rows[b]`` in float32, without the samples whose factor is zero.

    A sample of factor zero contributes nothing, even if its gradient is not finite.

    Args:
        rows: ``[B, N]``, in float32 or half precision.
        factors: ``[B]``.
    """
    if get_proxy_mode() is None:
        return _weighted_sum(rows, factors)
    found: Tensor = weighted_sum_of_rows(rows, factors)
    return found


def _weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    launch = launcher("weighted_sum_launch") if rows.is_cuda else None
    found = None if launch is None else launch.weighted_sum(rows, factors)
    if found is None:
        found = (select_rows(rows, factors != 0).float() * factors.float()[:, None]).sum(0)
    return found


# A traced graph holds the sum as one node, which a compiler leaves as it is.
@torch.library.custom_op("clipgrad::weighted_sum_of_rows", mutates_args=())
def weighted_sum_of_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Run ``weighted_sum`` as one node of a graph."""
    return _weighted_sum(rows, factors)


@weighted_sum_of_rows.register_fake
def _(rows: Tensor, factors: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[1], dtype=torch.float32)
