"""Scatter sums over ranks in flat buckets, and gather the means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor

from clipgrad.distributed.buckets import Bucket, buckets
from clipgrad.distributed.collectives import Started, all_gather, reduce_scatter


class ScatteredSums:
    """This class holds this rank's part of the clipped sums over all ranks.

    Args:
        sums: Clipped sums of this rank; the call empties the list.
        parameters: Parameters of the same shapes and strides.
        group: The process group.
        reached: A context manager that names the step in errors of the collectives inside it.
    """

    private = True

    def __init__(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        group: dist.ProcessGroup,
        reached: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._group, self._reached, self._count = group, reached, len(sums)
        ranks = dist.get_world_size(group)
        self._buckets: list[Bucket] = list(buckets(sums, parameters, ranks))
        self.parts: list[Tensor] = []
        sent = Started(reached)
        for bucket in self._buckets:
            # A bucket is filled while the previous one is sent.
            flat = sums[-1].new_zeros(bucket.length)
            for place in bucket.places:
                place.of(flat).copy_(sums.pop())
            part = flat.new_empty(bucket.length // ranks)
            sent.wait()
            with reached():
                sent.start(reduce_scatter(part, flat, group), flat)
            self.parts.append(part)
        sent.wait()

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """Return the means of all ranks as views of their buckets; the call empties ``means``."""
        whole: dict[int, Tensor] = {}
        sent = Started(self._reached)
        # These are the only references, so each part is freed after it is sent.
        parts = means[::-1]
        means.clear()
        self.parts.clear()
        for bucket in self._buckets:
            # Means are sent in the parameter's dtype, to which .grad would round them anyway.
            part = parts.pop().to(bucket.dtype)
            sent.wait()
            flat = part.new_empty(bucket.length)
            with self._reached():
                sent.start(all_gather(flat, part, self._group), part)
            del part
            whole.update((place.index, place.of(flat)) for place in bucket.places)
        sent.wait()
        return [whole[index] for index in range(self._count)]
