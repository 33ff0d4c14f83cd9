"""Ranks that all hold the whole model: sums are scattered over them, noised in parts, and gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from clipgrad.distributed import costs
from clipgrad.distributed.group import Group
from clipgrad.distributed.scattered import ScatteredSums
from clipgrad.ranks import Cost


class Replicated(Group):
    """Processes of one group, each with the whole model and samples of its own."""

    is_sharded = False

    before_recipe: Callable[[Sequence[Tensor]], None] | None = None

    def whole(self, model: nn.Module, step: int) -> AbstractContextManager[None]:
        """The parameters are whole on every rank."""
        return nullcontext()

    def passes(self, own: int) -> int:
        """Its own microbatches: nothing is sent before the step."""
        return own

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Nothing to gather."""

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Own sums, until the step."""
        return list(totals)

    def squared_norms(self, own: Tensor) -> Tensor:
        """The norms as they are: a rank holds whole gradients of its samples."""
        return own

    def share(
        self, sums: list[Tensor], parameters: Sequence[Tensor], *, aliases_graph: bool
    ) -> ScatteredSums:
        """This rank's part of the totals, one flat tensor for each bucket."""
        return ScatteredSums(sums, parameters, self._group, self._reached)

    def costs(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> tuple[Cost, ...]:
        """Sums and buckets."""
        return costs.of_replicas(parameters, dtypes, self._group)
