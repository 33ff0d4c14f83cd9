"""What one call of a ``ClippedGrad`` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of each sample, counted when somebody asks: counting costs several small operations.

    Attributes:
        norms: Per-sample norms, ``[B]`` per clipping group.
        bounds: The clipping norm of each group.
        nonfinite: Boolean ``[B]``: samples that were dropped because their gradient was not finite.
        is_padding: Boolean ``[B]``, or None if no sample is padding.
    """

    norms: Sequence[Tensor]
    bounds: Sequence[float]
    nonfinite: Tensor
    is_padding: Tensor | None

    @cached_property
    def num_clipped(self) -> Tensor:
        """How many samples had a norm above the clipping norm, in any group."""
        above = [norms > bound for norms, bound in zip(self.norms, self.bounds, strict=True)]
        clipped = torch.stack(above).any(0) & ~self.nonfinite
        return (clipped if self.is_padding is None else clipped & ~self.is_padding).sum()

    @cached_property
    def num_nonfinite(self) -> Tensor:
        """How many samples were dropped because their gradient was not finite."""
        return self.nonfinite.sum()


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
        outcome: What became of each sample: what the counts below are taken from.
    """

    grads: Any
    values: Tensor
    grad_norms: Tensor | Mapping[str, Tensor]
    aux: Any
    batch_size: int
    outcome: Outcome = field(repr=False)

    @property
    def num_clipped(self) -> Tensor:
        """How many of them had a norm above the clipping norm (in any group), a scalar tensor.

        ``Automatic`` scales the others too. Counted from ``grad_norms`` when it is first asked for.
        """
        return self.outcome.num_clipped

    @property
    def num_nonfinite(self) -> Tensor:
        """How many were dropped because their gradient was not finite, a scalar tensor."""
        return self.outcome.num_nonfinite


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
