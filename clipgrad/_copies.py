"""Copies of many tensors at the price of one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all tensors, with a launch for each dtype and not for each tensor."""
    groups: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(index)
    found = list(tensors)
    for dtype, members in groups.items():
        chosen = [tensors[index] for index in members]
        # Times one is the value itself, NaN, infinities and the sign of zero included.
        made = (
            torch._foreach_mul(chosen, 1.0)
            if dtype.is_floating_point
            else [tensor.clone() for tensor in chosen]
        )
        for index, copy in zip(members, made, strict=True):
            found[index] = copy
    return found
