"""Find the smallest clipping norm for which underflow of squares cannot hide what a sample contributes.

Squares of numbers below ``sqrt(tiny)`` vanish or lose digits. ``tiny`` is the smallest normal number of the dtype that
norms are computed in; with ``torch.set_flush_denormal`` smaller numbers are zero. So a squared norm may come out too
small by ``tiny`` for each element, and by ``2^26 tiny`` for each use of a parameter in a ghost norm
(``rules/ghost.py``). With at most ``2^40`` elements and ``2^13`` uses, a true norm ``n`` that is computed as ``m`` has
``n^2 - m^2 <= 2^41 tiny``. Such a sample contributes ``C n / m`` if ``m > C``, or ``n`` if ``m <= C``. Both are at most

    C sqrt(1 + 2^41 tiny / C^2)  <=  C (1 + 2^40 tiny / C^2)

which is ``C (1 + 2^-20)``, one part in a million more than C, for ``C = 2^30 sqrt(tiny)``: 1.2e-10 in float32, 1.6e-145
in float64. Half precision is widened to float32. For ``Automatic``, ``C n / (m + gamma) <= C`` in any case, since
``gamma`` is at least 1e-6.

Norms too large for their squares are computed as infinite, and such a sample contributes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from clipgrad.clipping._groups import Clipping

_ROOTS = 2.0**30


def smallest_norm(dtypes: Iterable[torch.dtype]) -> float:
    """Return the smallest positive clipping norm for parameters of these dtypes; 0 without parameters."""
    wide = [torch.promote_types(dtype, torch.float32) for dtype in dtypes]
    return max((_ROOTS * math.sqrt(torch.finfo(dtype).tiny) for dtype in wide), default=0.0)


def refuse_tiny_norms(clipping: Clipping, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a clipping norm so small that underflow could hide a larger contribution; 0 is legal.

    Args:
        clipping: The clipping, with a norm for each group.
        dtypes: The dtypes of the parameters.

    Raises:
        ValueError: If a norm is positive but too small.
    """
    smallest = smallest_norm(dtypes)
    for group, norm in zip(clipping.groups, clipping.norms, strict=True):
        if 0 < norm < smallest:
            where = f" of group {group!r}" if group else ""
            raise ValueError(
                f"max_grad_norm{where} is {norm:.3g}, below {smallest:.2g}: squares of this dtype underflow there, so "
                "that larger gradients could pass unclipped. Use a larger norm (multiply loss and norm by a constant), "
                "float64 parameters, or 0. If a schedule or AdaptiveQuantile chose this norm, bound the schedule, or "
                "lower learning_rate."
            )
