"""Scatter sums over ranks in flat buckets, and gather the means."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from clipgrad.distributed.buckets import Bucket, buckets
from clipgrad.distributed.collectives import all_gather, nobody_lost, reduce_scatter

# Number of buckets that are sent at the same time: one is filled while the previous one is sent.
_IN_FLIGHT = 2


class ScatteredSums:
    """This class holds this rank's part of the clipped sums over all ranks.

    Args:
        sums: Clipped sums of this rank; the call empties the list.
        parameters: Parameters of the same shapes and strides.
        group: The process group.
        during: The call and the step that an error names.
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
            # The collective reads flat until it ends, so flat is kept with it.
            works.append((reduce_scatter(part, flat, group), flat))
            self.parts.append(part)
        for work, _ in works:
            work.wait()

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """Return the means of all ranks as views of their buckets; the call empties ``means``."""
        with nobody_lost(self._during, self._group):
            return self._gathered(means)

    def _gathered(self, means: list[Tensor]) -> list[Tensor]:
        whole: dict[int, Tensor] = {}
        works: deque[tuple[Any, Tensor]] = deque()
        parts = means[
            ::-1
        ]  # These are the only references, so each part is freed after it is sent.
        means.clear()
        self.parts.clear()
        for bucket in self._buckets:
            while len(works) >= _IN_FLIGHT:
                works.popleft()[0].wait()
            # Means are sent in the parameter's dtype, to which .grad would round them anyway.
            part = parts.pop().to(bucket.dtype)
            flat = part.new_empty(bucket.length)
            works.append((all_gather(flat, part, self._group), part))
            whole.update((place.index, place.of(flat)) for place in bucket.places)
        for work, _ in works:
            work.wait()
        return [whole[index] for index in range(self._count)]
