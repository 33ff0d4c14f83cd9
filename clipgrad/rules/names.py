"""One operation, the many names that it can be called by.

``F.embedding``, ``torch.embedding``, ``torch.ops.aten.embedding`` and its overloads (which exported models call) are
one operation. What holds for one name holds for all; only the order of the arguments may differ, from Python's
function to ATen's.
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
    """Every function that is called by the name of an operation of ATen's, or stands for it.

    Args:
        operation: ATen's name: ``"embedding"``, ``"linalg_solve"``.
    """
    found = [getattr(home, operation) for home in _HOMES if hasattr(home, operation)]
    space, _, short = operation.partition("_")
    for home in _SPACES.get(space, ()):
        found += [getattr(home, name) for name in (short, operation) if hasattr(home, name)]
    found += aten_names_of(operation)
    return list(dict.fromkeys(found))


def aten_names_of(operation: str) -> list[Function]:
    """ATen's operation and all of its overloads; nothing where this PyTorch does not have it."""
    packet = getattr(torch.ops.aten, operation, None)
    if packet is None:
        return []
    return [packet, *(getattr(packet, overload) for overload in packet.overloads())]


def functional_aten_names_of(operation: str) -> list[Function]:
    """Those without ``out=``: what a rule may intercept."""
    return [name for name in aten_names_of(operation) if not str(name).endswith("out")]


def by_all_names(operation: str, correction: Function) -> dict[Function, Function]:
    """A correction with ATen's signature, for each name of its operation.

    A name that takes its arguments in another order needs an entry of its own behind this one.
    """
    return dict.fromkeys(names_of(operation), _with_atens_conventions(operation, correction))


def each_name(operation: str, correct: Callable[[Function], Function]) -> dict[Function, Function]:
    """A correction made of each name of an operation, whose signature it keeps."""
    return {name: correct(name) for name in names_of(operation)}


def _with_atens_conventions(operation: str, correction: Function) -> Function:
    """ATen calls the first operand ``self``, which Python calls ``input``, and has variants with ``out=``."""

    def corrected(*args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("out", None) is not None:
            raise NotPerSampleError(
                f"{operation} with out= writes per-sample values into a tensor that was made beforehand. Leave out= "
                "away and use what the operation returns."
            )
        if "self" in kwargs:
            args = (kwargs.pop("self"), *args)
        return correction(*args, **kwargs)

    return corrected


__all__ = ["aten_names_of", "by_all_names", "each_name", "functional_aten_names_of", "names_of"]
