"""Sums that are scattered over ranks in flat buckets, and means that are gathered from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from clipgrad.distributed.buckets import Bucket, buckets
from clipgrad.distributed.collectives import all_gather, nobody_lost, reduce_scatter

# Buckets on their way at once: one is filled while the one before travels.
_IN_FLIGHT = 2


class ScatteredSums:
    """This rank's part of the clipped sums over all ranks.

    Args:
        sums: Clipped sums of this rank; the list is emptied.
        parameters: Of the same shapes and strides.
        group: The ranks.
        during: What an error names.
    """

    private = True

    def __init__(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        group: dist.ProcessGroup,
        during: str,
    ) -> None:
        self._group, self._during, self._count = group, during, len(sums)
        ranks = dist.get_world_size(group)
        self._buckets: list[Bucket] = list(buckets(sums, parameters, ranks))
        self.parts: list[Tensor] = []
        works: deque[tuple[Any, Tensor]] = deque()
        for bucket in self._buckets:
            while len(works) >= _IN_FLIGHT:
                works.popleft()[0].wait()
            flat = sums[-1].new_zeros(bucket.length)
            for place in bucket.places:
                place.of(flat).copy_(sums.pop())
            part = flat.new_empty(bucket.length // ranks)
            works.append(
                (reduce_scatter(part, flat, group), flat)
            )  # it reads flat until it is done
            self.parts.append(part)
        for work, _ in works:
            work.wait()

    def places(self, names: Sequence[str]) -> list[str]:
        """What each bucket holds and where, and which part of it this is."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        return [
            f"part {rank + 1} of {ranks} of {bucket.length} values: "
            + ", ".join(f"{names[place.index]} from {place.start}" for place in bucket.places)
            for bucket in self._buckets
        ]

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """The means of all ranks, as views of one memory for each bucket; ``means`` is emptied."""
        with nobody_lost(self._during, self._group):
            return self._gathered(means)

    def _gathered(self, means: list[Tensor]) -> list[Tensor]:
        whole: dict[int, Tensor] = {}
        works: deque[tuple[Any, Tensor]] = deque()
        parts = means[::-1]  # the only references: each part is freed when it was sent
        means.clear()
        self.parts.clear()
        for bucket in self._buckets:
            while len(works) >= _IN_FLIGHT:
                works.popleft()[0].wait()
            # Rounded to the parameter's dtype on the way, as it would be in .grad.
            part = parts.pop().to(bucket.dtype)
            flat = part.new_empty(bucket.length)
            works.append((all_gather(flat, part, self._group), part))
            whole.update((place.index, place.of(flat)) for place in bucket.places)
        for work, _ in works:
            work.wait()
        return [whole[index] for index in range(self._count)]
