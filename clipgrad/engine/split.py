"""Run the loss on parts of a microbatch, if samples take different branches (``branches="split"``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clipgrad.engine.branches import Disagreement
from clipgrad.engine.inputs import copy_samples, select_samples
from clipgrad.errors import NotPerSampleError


class Parts:
    """This class yields a microbatch whole at first, and then in parts if its samples take different branches.

    A loss may write to its batch (``x.mul_(2)``), and samples of a part may run more than once. So every run gets
    copies of the original values. ``write_back`` then writes to the batch what a single run would have written.
    """

    def __init__(self, batch: Sequence[Any]) -> None:
        self._batch = batch
        self._size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
        self._running = torch.arange(self._size, device="cpu")
        self._waiting = [self._running]
        self._finished: list[tuple[Tensor, list[Any], list[int]]] = []

    def __iter__(self) -> Iterator[tuple[list[Any], Tensor]]:
        """Yield rows and their indices until all samples have run; call ``split`` if a run ends in a disagreement."""
        while self._waiting:
            index = self._running = self._waiting.pop()
            rows = self._copies(index)
            versions = [leaf._version for leaf in _tensors(rows)]
            self._finished.append((index, rows, versions))
            yield rows, index

    def split(self, disagreement: Disagreement) -> None:
        """Run the current part's samples again in two parts: those that agree with its first sample, and the rest."""
        self._finished.pop()
        index = self._running
        self._waiting.extend(index[part] for part in reversed(disagreement.parts()))

    @property
    def order(self) -> Tensor:
        """Return the index that brings the samples from the order of the runs into the order of the batch."""
        return torch.cat([index for index, _, _ in self._finished]).argsort()

    def write_back(self) -> None:
        """Write to the batch what the loss wrote to its copies; refuse writes to memory that two tensors share."""
        for index, rows, before in self._finished:
            both = zip(_tensors(self._batch), _tensors(rows), before, strict=True)
            for leaf, values, version in both:
                if values._version != version:
                    self._refuse_shared(leaf)
                    leaf.index_copy_(0, index.to(leaf.device), values)

    def _copies(self, index: Tensor) -> list[Any]:
        if len(index) < self._size:
            return select_samples(self._batch, index)
        return copy_samples(self._batch)

    def _refuse_shared(self, written: Tensor) -> None:
        memory = written.untyped_storage()._cdata
        if sum(leaf.untyped_storage()._cdata == memory for leaf in _tensors(self._batch)) > 1:
            raise NotPerSampleError(
                "the loss writes in place to a tensor of the batch whose memory another tensor of the batch shares, "
                "and branches='split' runs the loss on copies, which share none. Use the out-of-place form, "
                "x = x.mul(2.0) instead of x.mul_(2.0), or pass x.clone()."
            )


def _tensors(batch: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in batch if isinstance(leaf, Tensor)]
