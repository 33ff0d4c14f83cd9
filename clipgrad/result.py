"""What one call of a ``ClippedGrad`` returns."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Diagnostics:
    """What the last ``backward`` saw. **Not private**: none of it may leave the trusted side.

    Attributes:
        losses: Per-sample losses, ``[B]``.
        grad_norms: Per-sample gradient norms before clipping, ``[B]``, or by clipping group.
        batch_size: Samples that were not padding.
        clipped_fraction: Share of them whose norm exceeded the clipping norm.
        num_nonfinite: Samples that were dropped because their gradient was not finite.
    """

    losses: Tensor
    grad_norms: Tensor | Mapping[str, Tensor]
    batch_size: int
    clipped_fraction: float
    num_nonfinite: int


def diagnostics_of(result: ClippedGradResult) -> Diagnostics:
    """The part of a result that may be looked at afterwards."""
    size = result.batch_size
    share = float(result.num_clipped) / size if size else math.nan
    return Diagnostics(result.values, result.grad_norms, size, share, int(result.num_nonfinite))


def mean_loss(result: ClippedGradResult, is_padding: Tensor | None) -> Tensor:
    """The mean loss of the samples that are not padding."""
    values = result.values
    return values.mean() if is_padding is None else values[~is_padding].mean()
