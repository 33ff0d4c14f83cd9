"""Sums that are scattered over ranks in flat buckets, and means that are gathered from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor

from clipgrad.distributed.buckets import Bucket, buckets
from clipgrad.distributed.collectives import OnItsWay, all_gather, reduce_scatter


class ScatteredSums:
    """This rank's part of the clipped sums over all ranks.

    Args:
        sums: Clipped sums of this rank; the list is emptied.
        parameters: Of the same shapes and strides.
        group: The ranks.
        reached: Names the step in the errors of a collective that its body starts or waits for.
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
        sent = OnItsWay(reached)
        for bucket in self._buckets:
            # A bucket is filled while the one before travels.
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
        """The means of all ranks, as views of one memory for each bucket; ``means`` is emptied."""
        whole: dict[int, Tensor] = {}
        sent = OnItsWay(self._reached)
        parts = means[::-1]  # the only references: each part is freed when it was sent
        means.clear()
        self.parts.clear()
        for bucket in self._buckets:
            # Rounded to the parameter's dtype on the way, as it would be in .grad.
            part = parts.pop().to(bucket.dtype)
            sent.wait()
            flat = part.new_empty(bucket.length)
            with self._reached():
                sent.start(all_gather(flat, part, self._group), part)
            del part
            whole.update((place.index, place.of(flat)) for place in bucket.places)
        sent.wait()
        return [whole[index] for index in range(self._count)]
