"""This module finds all names under which one operation can be called.

``F.embedding``, ``torch.embedding``, ``torch.ops.aten.embedding`` and its overloads (which exported models call) are
one operation. A rule or correction must cover all names. Only the argument order may differ between Python and ATen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.errors import NotPerSampleError

Function = Callable[..., Any]
_HOMES = (torch, Tensor, F, torch._C._VariableFunctions, torch._C._nn, torch._VF)
_SPACES = {
    "linalg": (torch.linalg, torch._C._linalg),  # type: ignore[attr-defined]
    "special": (torch.special, torch._C._special),  # type: ignore[attr-defined]
    "fft": (torch.fft, torch._C._fft),  # type: ignore[attr-defined]
}


def names_of(operation: str) -> list[Function]:
    """Return every function under which one of ATen's operations, such as ``"linalg_solve"``, can be called."""
    found = [getattr(home, operation) for home in _HOMES if hasattr(home, operation)]
    space, _, short = operation.partition("_")
    for home in _SPACES.get(space, ()):
        found += [getattr(home, name) for name in (short, operation) if hasattr(home, name)]
    found += aten_names_of(operation)
    return list(dict.fromkeys(found))


def aten_names_of(operation: str) -> list[Function]:
    """Return ATen's operation and all its overloads, or an empty list if this PyTorch lacks the operation."""
    packet = getattr(torch.ops.aten, operation, None)
    if packet is None:
        return []
    return [packet, *(getattr(packet, overload) for overload in packet.overloads())]


def functional_aten_names_of(operation: str) -> list[Function]:
    """Return ATen's operation and its overloads without ``out=``, which a rule may intercept."""
    return [name for name in aten_names_of(operation) if not str(name).endswith("out")]


def by_all_names(operation: str, correction: Function) -> dict[Function, Function]:
    """Map each name of an operation to one correction with ATen's signature.

    A name with another argument order needs its own entry, which must come after this mapping.
    """
    return dict.fromkeys(names_of(operation), _with_atens_conventions(operation, correction))


def each_name(operation: str, correct: Callable[[Function], Function]) -> dict[Function, Function]:
    """Map each name of an operation to a correction that keeps the signature of that name."""
    return {name: correct(name) for name in names_of(operation)}


def _with_atens_conventions(operation: str, correction: Function) -> Function:
    """Accept ATen's keyword ``self`` for the first operand and refuse ``out=``."""

    def corrected(*args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("out", None) is not None:
            raise NotPerSampleError(
                f"{operation} with out= writes per-sample values into a tensor that was made before, which cannot be "
                "followed. Omit out= and use the tensor that the operation returns."
            )
        if "self" in kwargs:
            args = (kwargs.pop("self"), *args)
        return correction(*args, **kwargs)

    return corrected
