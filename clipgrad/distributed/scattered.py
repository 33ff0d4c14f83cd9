"""Sums that are scattered over ranks in flat buckets, noised in parts, and gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor

from clipgrad.distributed.buckets import Bucket, buckets
from clipgrad.distributed.collectives import Started, all_gather, reduce_scatter
from clipgrad.ranks import Noised


def scattered_means(
    sums: list[Tensor],
    parameters: Sequence[Tensor],
    noised: Noised,
    group: dist.ProcessGroup,
    reached: Callable[[], AbstractContextManager[None]],
) -> list[Tensor]:
    """Return noised means over all ranks; each rank adds noise to its part of each bucket before others get it.

    While a rank draws the noise of a bucket, the sums of the next one are sent. While it fills a bucket, the means of
    another one are sent.

    Args:
        sums: Clipped sums of this rank; the call empties the list.
        parameters: Parameters of the same shapes and strides.
        noised: Makes noised means of this rank's parts.
        group: The process group.
        reached: A context manager that names the step in errors of the collectives inside it.

    Returns:
        Views of the buckets, in the dtypes of the parameters.
    """
    count, ranks = len(sums), dist.get_world_size(group)
    whole: dict[int, Tensor] = {}
    # One collective at a time, since a second one would take memory for another bucket.
    sent = Started(reached)

    def gather(bucket: Bucket, part: Tensor) -> None:
        (mean,) = noised([part], in_place=True)
        # Means are sent in the parameter's dtype, to which .grad would round them anyway.
        mean = mean.to(bucket.dtype)
        sent.wait()
        flat = mean.new_empty(bucket.length)
        with reached():
            sent.start(all_gather(flat, mean, group), mean)
        whole.update((place.index, place.of(flat)) for place in bucket.places)

    previous: tuple[Bucket, Tensor] | None = None
    for bucket in list(buckets(sums, parameters, ranks)):
        flat = sums[-1].new_zeros(bucket.length)
        for place in bucket.places:
            place.of(flat).copy_(sums.pop())
        part = flat.new_empty(bucket.length // ranks)
        sent.wait()
        with reached():
            sent.start(reduce_scatter(part, flat, group), flat)
        del flat
        if previous is not None:
            gather(*previous)
        previous = bucket, part
    sent.wait()
    if previous is not None:
        gather(*previous)
    sent.wait()
    return [whole[index] for index in range(count)]
