"""List the operations that may run once on the parameters that all samples share, instead of once per sample.

``w.t()`` in ``x @ w.t()``, a weight norm, a low-rank product ``a @ b`` or a slice of a packed projection depend on
parameters alone. On per-sample copies such an expression costs ``B`` times the work and hides the weight from the
rules. Run once, its result is tracked like a parameter. The gradient is pulled back to the parameters with the
vector-Jacobian product, which is linear and so commutes with the clipped sum.

The list is closed on purpose: a random operation (dropout on a weight) must differ from sample to sample. All
operations that are not listed run on per-sample copies, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_VIEWS = """
    t T mT H mH transpose swapaxes swapdims permute movedim moveaxis view reshape flatten
    unflatten ravel unsqueeze squeeze contiguous view_as reshape_as narrow select chunk split
    split_with_sizes tensor_split unbind __getitem__ diagonal clone expand expand_as
"""

_ARITHMETIC = """
    as_strided to float double half bfloat16 type_as add sub mul div neg pow square sqrt rsqrt reciprocal
    exp log log1p expm1 abs sigmoid tanh relu softplus softmax log_softmax clamp clamp_min
    clamp_max sin cos matmul mm bmm mv dot addmm linear outer einsum sum mean prod norm cumsum flip
    roll cat stack tril triu __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__
    __rtruediv__ __neg__ __pow__ __matmul__ __rmatmul__ __rpow__ rsub repeat tile
    repeat_interleave broadcast_to kron _weight_norm vector_norm normalize softmin gelu silu
    where maximum minimum inverse solve inv qr matrix_exp matrix_norm diag diag_embed
"""


def _functions(names: str) -> set[Callable[..., Any]]:
    homes = (torch.Tensor, torch, torch.nn.functional, torch.linalg, torch._C._VariableFunctions)
    found: set[Callable[..., Any]] = set()
    for name in names.split():
        for home in homes:
            member = getattr(home, name, None)
            if member is None:
                continue
            getter = getattr(member, "__get__", None)
            is_property = home is torch.Tensor and not callable(member)
            found.add(getter if is_property and getter is not None else member)
    return found


VIEWS = _functions(_VIEWS)
SHAREABLE = VIEWS | _functions(_ARITHMETIC)

# expand repeats elements, so norms do not carry over; the other views only move elements.
_REPEATING = _functions("expand expand_as")
_NOT_A_WRITE = {"requires_grad_", "share_memory_", "rename_"}
_WRITING_OPERATORS = """
    __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __imatmul__ __iand__
    __ior__ __ixor__ __ilshift__ __irshift__ __setitem__
"""
_WITH_INPLACE = {torch.nn.functional.relu, torch.nn.functional.silu}


def is_injective(function: Callable[..., Any], source: Tensor, result: Tensor) -> bool:
    """Return whether ``result`` holds elements of ``source``, each at most once, and nothing else."""
    if function not in VIEWS or function in _REPEATING:
        return False
    if result.dtype != source.dtype:
        return False
    # Advanced indexing copies and may repeat an element; a basic index is a view of the source.
    if function is torch.Tensor.__getitem__:
        return result._is_view()
    return result.numel() <= source.numel()


def writes_to_first(function: Callable[..., Any]) -> bool:
    """Return whether a function always overwrites its first argument: ``clamp_``, ``+=``, ``w[0] = ...``."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name in _WRITING_OPERATORS.split()
    return name.endswith("_") and name not in _NOT_A_WRITE


def writes_in_place(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Return whether a call has an argument that makes it write in place: ``F.relu(w, inplace=True)``, ``out=``.

    The gradient of an earlier use of that operand would then be pulled back through the overwritten value.
    """
    requested = kwargs.get("inplace", False) or kwargs.get("out") is not None
    return bool(requested or (function in _WITH_INPLACE and any(args[1:])))
