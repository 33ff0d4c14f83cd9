"""Refuse user-defined operations that have a ``vmap`` rule of their own.

Autograd records below the ``vmap`` over samples. If a vmap rule runs the operation once for all samples, its backward
pass also runs once, on the output gradients of all samples. A backward pass that does not treat rows separately
(``grad / grad.norm()``) then mixes samples, while the definition ``vmap(grad)`` runs it for each sample. The two kinds
cannot be distinguished. With ``generate_vmap_rule = True``, or without a rule, PyTorch runs both passes per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from clipgrad._functorch import FUNCTION_CALL, has_vmap_method
from clipgrad.engine.error_messages import NeedsGraphError
from clipgrad.errors import NotPerSampleError

_PYTORCHS_OWN = {"aten", "prims", "prim"}
_MIXES = (
    "Its backward pass would run on the gradients of all samples at once, and would mix samples unless it treats each "
    "row alone."
)


def has_custom_vmap(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Return whether a call under ``vmap`` runs a batching rule that PyTorch neither defines nor generates."""
    if function is FUNCTION_CALL:
        return has_vmap_method(args[0])
    if isinstance(function, OpOverload):
        names = [function.name()]
    elif isinstance(function, OpOverloadPacket):
        names = [getattr(function, overload).name() for overload in function.overloads()]
    else:
        return False
    return any(
        name.partition("::")[0] not in _PYTORCHS_OWN
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched")
        for name in names
    )


def custom_vmap_error(function: Callable[..., Any], args: Sequence[Any]) -> NotPerSampleError:
    """Return the error to raise if the backward pass of such a call would run."""
    if function is FUNCTION_CALL:
        return NeedsGraphError(
            f"the loss calls {args[0].__name__}, an autograd.Function with a vmap method of its own. {_MIXES} Set "
            "generate_vmap_rule = True in its place, or register a rule for a function that calls it, with "
            "clipgrad.rules.register_rule."
        )
    return NotPerSampleError(
        f"the loss calls {function}, an operation with a vmap rule of its own (torch.library.register_vmap). {_MIXES} "
        "Leave the vmap rule out, or register a rule for the operation with clipgrad.rules.register_rule."
    )
