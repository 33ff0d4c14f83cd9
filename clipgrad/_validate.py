"""Checks of arguments. Every message names the argument, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}.")
    return float(value)


def positive_int_or_none(name: str, value: int | None) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(
            f"{name} must be a positive integer, or None for the whole batch, got {value!r}."
        )
    return value


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def batch_size(leaves: Sequence[Any], paths: Sequence[str]) -> int:
    """The common leading size of all tensors of a batch."""
    sizes = {
        path: leaf.shape[0] if leaf.dim() else None
        for leaf, path in zip(leaves, paths, strict=True)
        if isinstance(leaf, Tensor)
    }
    if not sizes:
        raise ValueError(
            "the batch holds no tensor, so it has no batch size; pass the samples as tensors whose first axis "
            "is the batch."
        )
    scalars = [path for path, size in sizes.items() if size is None]
    if scalars:
        raise ValueError(
            f"batch argument {scalars[0]} is a scalar tensor and has no batch axis; pass constants as Python "
            "numbers, or close over them in the loss."
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(
            f"batch arguments disagree about the batch size ({listed}); their first axes must match."
        )
    return int(next(iter(sizes.values())) or 0)


def padding_mask(mask: Tensor | None, size: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype is not torch.bool or mask.shape != (size,):
        raise ValueError(
            f"is_padding must be a boolean tensor of shape ({size},), got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    return mask
