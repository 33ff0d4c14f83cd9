"""Check the arguments of noise sources. Nothing here is random."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Noise for half types is sampled in float32 and rounded once, when it is added.
NOISE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_LIMITS = {dtype: torch.finfo(dtype) for dtype in NOISE_DTYPE}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def real(name: str, value: object) -> float:
    """Return a Python float. A tensor is refused, since reading it would wait for its device."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}; pass float({name}).")
    return float(value)


def scale(name: str, value: object) -> float:
    """Return a finite float, at least 0."""
    number = real(name, value)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name} must be finite and at least 0, got {number}; 0 means no noise.")
    return number


def count(name: str, value: object) -> int:
    """Return an integer, at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}; 1 is the default.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; 1 is the default.")
    return int(value)


def targets(tensors: Sequence[Tensor] | Tensor, sigma: float) -> list[Tensor]:
    """Return the tensors as a list after checking all of them, so that no tensor gets noise if one is refused."""
    if isinstance(tensors, Tensor):
        raise TypeError("tensors must be a sequence of tensors, got one tensor; pass [tensor].")
    checked = list(tensors)
    if not _all_plain(checked, sigma):
        for index, tensor in enumerate(checked):
            _refuse_or_accept(f"tensors[{index}]", tensor, sigma)
    _refuse_duplicates(checked)
    return checked


def _all_plain(tensors: list[Any], sigma: float) -> bool:
    """Return whether no tensor can be at fault, by a few fast passes that accept the sums of a usual training step."""
    if not set(map(type, tensors)) <= _PLAIN_TYPES or not all(map(Tensor.is_contiguous, tensors)):
        return False
    limits = [_LIMITS.get(dtype) for dtype in {tensor.dtype for tensor in tensors}]
    return (
        all(known is not None and known.tiny <= sigma <= known.max for known in limits)
        and {tensor.layout for tensor in tensors} <= {torch.strided}
        and not any(tensor.is_meta for tensor in tensors)
    )


def _refuse_duplicates(tensors: list[Tensor]) -> None:
    if len(set(map(Tensor.data_ptr, tensors))) == len(tensors):
        return
    seen = set()
    for index, tensor in enumerate(tensors):
        key = (tensor.device, tensor.data_ptr())
        if key in seen and tensor.numel():
            raise ValueError(
                f"tensors[{index}], of shape {tuple(tensor.shape)}, is in tensors twice and would "
                "get noise twice; pass it once."
            )
        seen.add(key)


def _refuse_or_accept(name: str, tensor: object, sigma: float) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {tensor!r}; leave out what has no gradient.")
    limits = _LIMITS.get(tensor.dtype)
    if limits is None or tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name} must be dense and float64, float32, float16 or bfloat16, got {tensor.dtype}, "
            f"{tensor.layout} on {tensor.device}; convert it, with .to_dense() if it is sparse."
        )
    if not limits.tiny <= sigma <= limits.max:
        raise ValueError(
            f"sigma = {sigma} cannot be represented in {tensor.dtype}, the dtype of {name}, so the "
            "noise would vanish or overflow. Keep the clipped sum in float32."
        )
    if 0 in tensor.stride() and not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}: several values share one memory location and cannot get "
            "independent noise. Pass tensor.contiguous()."
        )


def require_state(found: Mapping[str, Any], kind: str) -> None:
    """Refuse a state dict of another kind of noise source or of a format other than 1."""
    got = (found.get("kind"), found.get("format"))
    if got != (kind, 1):
        raise ValueError(
            f"state must come from {kind}.state_dict(), kind {kind!r} and format 1, got kind and "
            f"format {got}; restore into an object of the class that was saved."
        )
