"""Copy and add many tensors with one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of all tensors, with one launch per dtype."""
    if not {Tensor, Parameter}.issuperset(map(type, tensors)):  # DTensors have no such operation
        return [tensor.clone() for tensor in tensors]
    found = list(map(torch.empty_like, tensors))
    for dtype in {tensor.dtype for tensor in tensors}:
        alike = [pair for pair in zip(found, tensors, strict=True) if pair[0].dtype is dtype]
        torch._foreach_copy_([copy for copy, _ in alike], [tensor for _, tensor in alike])
    return found


def add_in_place(totals: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    """Add to tensors in place, and to the local parts of DTensors of one placement.

    torch 2.11 forgets what its own operation adds to a DTensor whose parts are terms of a sum.
    """
    torch._foreach_add_(list(map(_local, totals)), list(map(_local, more)))


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    return local
