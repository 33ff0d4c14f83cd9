"""Which operations may run once on the parameters that all samples share, instead of once per sample.

``x @ w.t()``, a weight norm, a low-rank product ``a @ b`` or a slice of a packed projection compute something
from parameters alone. Run on per-sample copies it costs ``B`` times the work and hides the weight from the
rules. Run once, its result is tracked like a parameter, and the gradient is pulled back to the parameters
through the ordinary vector-Jacobian product, which is linear and so commutes with the clipped sum.

The list is closed on purpose: an operation with randomness (dropout on a weight) must differ from sample to
sample, so anything not listed here takes the exact per-sample road.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_VIEWS = """
    t T mT H mH transpose swapaxes swapdims permute movedim moveaxis view reshape flatten
    unflatten ravel unsqueeze squeeze contiguous view_as reshape_as narrow select chunk split
    split_with_sizes tensor_split unbind __getitem__ diagonal clone expand expand_as
"""

_ARITHMETIC = """
    to float double half bfloat16 type_as add sub mul div neg pow square sqrt rsqrt reciprocal
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

# ``expand`` repeats elements, so norms do not carry over; the other views only move them.
_REPEATING = _functions("expand expand_as")


def is_injective(function: Callable[..., Any], source: Tensor, result: Tensor) -> bool:
    """Whether ``result`` holds elements of ``source``, each at most once, and nothing else."""
    if function not in VIEWS or function in _REPEATING:
        return False
    if result.dtype != source.dtype:
        return False
    # Advanced indexing copies and may repeat an element; a basic index is a view of the source.
    if function is torch.Tensor.__getitem__:
        return result._is_view()
    return result.numel() <= source.numel()
