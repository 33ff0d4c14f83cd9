"""This module sets dropped samples of a tensor to zero by selection, because ``0 * inf`` would be NaN.

Usually no sample is dropped, but this is not known before a graph runs. A selection always costs a pass over the
tensor. Writing zeros to dropped samples in place costs nothing if there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.kernels.launcher import launcher

# On these devices graphs write zeros in place instead of a selection.
_ZEROED_IN_GRAPHS_ON = {"cuda"}


def reshape_to_broadcast(values: Tensor, tensor: Tensor) -> Tensor:
    """Reshape one value per sample, ``[B]``, so that it broadcasts over ``tensor``, ``[B, ...]``."""
    return values.view(-1, *[1] * (tensor.dim() - 1))


def select_rows(tensor: Tensor, keep: Tensor) -> Tensor:
    """Return the tensor ``[B, ...]`` with zeros for all samples outside the boolean mask ``[B]``."""
    return torch.where(reshape_to_broadcast(keep, tensor), tensor, tensor.new_zeros(()))


def select_rows_reusing(tensor: Tensor, keep: Tensor) -> Tensor:
    """Run ``select_rows`` for a tensor that is not read afterwards, with a result that must be in memory.

    A compiled graph writes zeros into the tensor itself if no later operation reads it (see ``compiled/zeroing.py``),
    but not into a broadcast tensor, whose samples share memory.
    """
    zeroed = get_proxy_mode() is not None and tensor.device.type in _ZEROED_IN_GRAPHS_ON
    if not zeroed or may_overlap(tensor):
        return select_rows(tensor, keep)
    selected: Tensor = selected_by_zeroing(tensor, keep)
    return selected


def may_overlap(tensor: Tensor) -> bool:
    """Return whether two elements may share memory; False is certain."""
    reach = 0  # largest offset over all axes with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


# A traced graph holds the first custom operation, and a compiled graph may replace it by the second.
@torch.library.custom_op("clipgrad::selected_by_zeroing", mutates_args=())
def selected_by_zeroing(tensor: Tensor, keep: Tensor) -> Tensor:
    """Run ``select_rows`` as one node of a graph."""
    return select_rows(tensor, keep)


@selected_by_zeroing.register_fake
def _(tensor: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("clipgrad::zero_rows_", mutates_args=("tensor",))
def zero_rows_(tensor: Tensor, keep: Tensor) -> None:
    """Write zeros in place to the samples outside the mask; elements must not share memory."""
    if may_overlap(tensor):
        raise RuntimeError(
            f"Zeros for one sample would overwrite other samples (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}). This is a bug in clipgrad; please report it, and omit compile until then."
        )
    launch = launcher("selection_launch") if tensor.device.type == "cuda" else None
    if launch is None or not launch.zero_rows_(tensor, keep):
        tensor.masked_fill_(~reshape_to_broadcast(keep, tensor), 0.0)


@zero_rows_.register_fake
def _(tensor: Tensor, keep: Tensor) -> None:
    return None
