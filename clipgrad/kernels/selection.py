"""Take samples out of a tensor by selection: ``0 * inf`` would be NaN.

Nearly always there is none to take out, and nobody knows before a graph runs. Writing a selection costs a pass over
the tensor in any case; writing zeros to the samples that are dropped, where the tensor lies, costs nothing if there are
none.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

# Where graphs select whether there is a sample to be dropped or not.
_ZEROED_IN_GRAPHS_ON = {"cuda"}


def for_each_row(values: Tensor, tensor: Tensor) -> Tensor:
    """One value for each sample, ``[B]``, to be broadcast over ``tensor``, ``[B, ...]``."""
    return values.view(-1, *[1] * (tensor.dim() - 1))


def select_rows(tensor: Tensor, keep: Tensor) -> Tensor:
    """The tensor ``[B, ...]`` with the samples outside of the boolean mask ``[B]`` zero."""
    return torch.where(for_each_row(keep, tensor), tensor, tensor.new_zeros(()))


def select_last(tensor: Tensor, keep: Tensor) -> Tensor:
    """The same where nobody reads the tensor afterwards, and what reads the result has to find it in memory.

    A compiled graph writes zeros to the tensor itself if it finds that to be so (see ``compiled._zeroing``). Not to one
    that is broadcast: its samples share their memory.
    """
    zeroed = get_proxy_mode() is not None and tensor.device.type in _ZEROED_IN_GRAPHS_ON
    if not zeroed or may_overlap(tensor):
        return select_rows(tensor, keep)
    selected: Tensor = selected_by_zeroing(tensor, keep)
    return selected


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may lie in the same place; False only if none do."""
    reach = 0  # of all axes with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


# Operations of their own: a traced graph holds the first, a compiled one the second in its place.
@torch.library.custom_op("clipgrad::selected_by_zeroing", mutates_args=())
def selected_by_zeroing(tensor: Tensor, keep: Tensor) -> Tensor:
    """``select_rows``, as a graph holds it."""
    return select_rows(tensor, keep)


@selected_by_zeroing.register_fake
def _(tensor: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("clipgrad::zero_rows_", mutates_args=("tensor",))
def zero_rows_(tensor: Tensor, keep: Tensor) -> None:
    """Write zeros to the samples outside of the mask, whose elements each have a place of their own."""
    if may_overlap(tensor):
        raise RuntimeError(
            f"zeros for one sample would be written to others: shape {tuple(tensor.shape)}, strides {tensor.stride()}. "
            "This is a mistake of clipgrad's; please report it, and leave compile out."
        )
    launcher = _launcher() if tensor.device.type == "cuda" else None
    if launcher is None or not launcher.zero_rows_(tensor, keep):
        tensor.masked_fill_(~for_each_row(keep, tensor), 0.0)


@zero_rows_.register_fake
def _(tensor: Tensor, keep: Tensor) -> None:
    return None


@cache
def _launcher() -> ModuleType | None:
    """What launches the kernel, if Triton is there; looking for a package that is not takes long."""
    if find_spec("triton") is None:
        return None
    from clipgrad.kernels import selection_launch

    return selection_launch
