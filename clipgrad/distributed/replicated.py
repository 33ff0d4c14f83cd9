"""Train on ranks that hold the whole model: sums are scattered, get noise in parts, and are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from clipgrad.distributed import costs
from clipgrad.distributed.group import Group
from clipgrad.distributed.scattered import scattered_means
from clipgrad.ranks import Cost, Noised


class Replicated(Group):
    """Each process of the group holds the whole model and its own samples."""

    is_sharded = False
    parameters_move = False
    sums_leave = False

    before_recipe: Callable[[Sequence[Tensor]], None] | None = None

    @property
    def within_batch(self) -> Replicated:
        """Return itself."""
        return self

    def release(self, model: nn.Module) -> None:
        """Do nothing, since the parameters are whole on every rank."""

    def gathered(self, model: nn.Module, step: int) -> AbstractContextManager[None]:
        """Do nothing, since the parameters are whole on every rank."""
        return nullcontext()

    def passes(self, own: int) -> int:
        """Return ``own``, since ranks send nothing before the step."""
        return own

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Do nothing, since there is nothing to gather."""

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of this rank; they are added up over ranks at the step."""
        return list(totals)

    def after_batch(self, sums: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums unchanged."""
        return sums

    def squared_norms(self, own: Tensor) -> Tensor:
        """Return ``own``, since a rank holds whole gradients of its samples."""
        return own

    def means(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        names: Sequence[str],
        noised: Noised,
        *,
        aliases_graph: bool,
    ) -> list[Tensor]:
        """Return the noised means, bucket by bucket; each rank draws the noise of its part of each bucket."""
        return scattered_means(sums, parameters, names, noised, self._group, self._reached)

    def costs(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> tuple[Cost, ...]:
        """Return what this rank holds and sends: sums, and buckets of them."""
        return costs.of_replicas(parameters, dtypes, self._group)
