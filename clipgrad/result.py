"""This module holds the results of a batch: clipped sums, and the outcome of each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Outcome:
    """This class holds norm, loss and flags of each sample. Counts are computed at first use and then cached."""

    losses: Tensor  # Per-sample losses, ``[B]``
    norms: Sequence[Tensor]  # Per-sample gradient norms before clipping, ``[B]`` per clipping group
    bounds: Sequence[float]  # The clipping norm of each group
    groups: Sequence[str] | None  # Their names; None if the whole gradient is clipped at once
    nonfinite: Tensor  # Boolean ``[B]``: samples dropped because their gradient was not finite
    is_padding: Tensor | None  # Boolean ``[B]``, or None if no sample is padding
    batch_size: int  # Number of samples that are not padding

    @property
    def grad_norms(self) -> Tensor | Mapping[str, Tensor]:
        """Return the per-sample norms ``[B]``, by group if there are groups."""
        if self.groups is None:
            return self.norms[0]
        return dict(zip(self.groups, self.norms, strict=True))

    @cached_property
    def num_clipped(self) -> Tensor:
        """Return how many samples had a norm above the clipping norm, in any group."""
        above = [norms > bound for norms, bound in zip(self.norms, self.bounds, strict=True)]
        clipped = torch.stack(above).any(0) & ~self.nonfinite
        return (clipped if self.is_padding is None else clipped & ~self.is_padding).sum()

    @cached_property
    def num_nonfinite(self) -> Tensor:
        """Return how many samples were dropped because their gradient was not finite."""
        return self.nonfinite.sum()

    @property
    def mean_loss(self) -> Tensor:
        """Return the mean loss of the samples that are not padding; NaN if there is none."""
        losses = self.losses if self.is_padding is None else self.losses[~self.is_padding]
        return losses.mean()


class NotPrivate(NamedTuple):
    """What ``backward`` returns if the loss returns ``(loss, metrics)``. **Not private**, neither of them.

    Attributes:
        loss: The mean loss of the samples that are not padding, detached.
        metrics: What the loss returned beside its value, of each sample that is not padding: ``[B, ...]``.
    """

    loss: Tensor
    metrics: Any


def outcome_of(
    losses: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    nonfinite: Sequence[Tensor],
    bounds: Sequence[float],
    groups: Sequence[str] | None,
    is_padding: Tensor | None,
) -> Outcome:
    """Return the outcome of a batch from the losses, norms and flags of its microbatches."""
    # ``cat`` copies a single tensor too: the loss may have returned a view of a large tensor.
    values = torch.cat(list(losses))
    padding = 0 if is_padding is None else int(is_padding.sum())
    return Outcome(
        values,
        [_concatenate(parts) for parts in zip(*norms, strict=True)],
        bounds,
        groups,
        _concatenate(nonfinite),
        is_padding,
        len(values) - padding,
    )


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate per-sample values of all microbatches; no other reference to them exists."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class ClippedGradResult:
    """This class holds the result of one call of a ``ClippedGrad``.

    The privacy guarantee covers ``grads`` only, and only with noise. Everything else depends on single samples and is
    **not private**.

    Attributes:
        grads: The clipped sum, with the structure of the parameters.
        aux: Per-sample auxiliary outputs stacked on a leading axis, or None.
        outcome: Norm, loss and flags of each sample, which the properties below read.
    """

    grads: Any
    aux: Any
    outcome: Outcome = field(repr=False)

    @property
    def values(self) -> Tensor:
        """Return the per-sample losses, ``[B]``."""
        return self.outcome.losses

    @property
    def grad_norms(self) -> Tensor | Mapping[str, Tensor]:
        """Return the norms before clipping, ``[B]``; a mapping from group to ``[B]`` if there are groups."""
        return self.outcome.grad_norms

    @property
    def batch_size(self) -> int:
        """Return the number of samples that are not padding."""
        return self.outcome.batch_size

    @property
    def num_clipped(self) -> Tensor:
        """Return how many samples had a norm above the clipping norm in any group, a scalar tensor.

        ``Automatic`` scales the other samples too.
        """
        return self.outcome.num_clipped

    @property
    def num_nonfinite(self) -> Tensor:
        """Return how many samples were dropped because their gradient was not finite, a scalar tensor."""
        return self.outcome.num_nonfinite


@dataclass(frozen=True)
class Diagnostics:
    """This class describes the samples of the last ``backward``. It is **not private** and must not be published.

    Attributes:
        losses: Per-sample losses, ``[B]``.
        grad_norms: Per-sample gradient norms before clipping, ``[B]``, or by clipping group.
        batch_size: Number of samples that were not padding.
        clipped_fraction: Share of these samples whose norm exceeded the clipping norm.
        num_nonfinite: Number of samples that were dropped because their gradient was not finite.
    """

    losses: Tensor
    grad_norms: Tensor | Mapping[str, Tensor]
    batch_size: int
    clipped_fraction: float
    num_nonfinite: int


def diagnostics_of(outcome: Outcome) -> Diagnostics:
    """Return the counts of a batch as Python numbers."""
    size = outcome.batch_size
    share = float(outcome.num_clipped) / size if size else math.nan
    return Diagnostics(outcome.losses, outcome.grad_norms, size, share, int(outcome.num_nonfinite))


def loss_and_metrics(outcome: Outcome, aux: Any) -> Tensor | NotPrivate:
    """Return the mean loss, and the metrics of all samples but padding; ``()`` stands for a loss without metrics."""
    if isinstance(aux, tuple) and not aux:
        return outcome.mean_loss
    if outcome.is_padding is not None:
        kept = ~outcome.is_padding
        aux = tree_map(lambda leaf: leaf[kept.to(leaf.device)], aux)
    return NotPrivate(outcome.mean_loss, aux)
