"""What one call of a ``ClippedGrad`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ClippedGradResult:
    """What one call of a ``ClippedGrad`` returns.

    Only ``grads`` is what the privacy guarantee speaks of, and only after noise. Everything else depends on
    single samples and is **not private**.

    Attributes:
        grads: The clipped sum, with the structure of the parameters.
        values: Per-sample losses, ``[B]``.
        grad_norms: Per-sample gradient norms before clipping, ``[B]``; with several clipping groups a mapping
            from group to ``[B]``.
        aux: Per-sample auxiliary outputs stacked on a leading axis, or None.
        batch_size: Number of samples that are not padding.
        num_clipped: How many of them had a norm above the clipping norm (in any group), a scalar tensor. ``Automatic``
            scales the others too.
        num_nonfinite: How many were dropped because their gradient was not finite, a scalar tensor.
    """

    grads: Any
    values: Tensor
    grad_norms: Tensor | Mapping[str, Tensor]
    aux: Any
    batch_size: int
    num_clipped: Tensor
    num_nonfinite: Tensor
