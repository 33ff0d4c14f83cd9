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
    names: Sequence[str],
    noised: Noised,
    group: dist.ProcessGroup,
    reached: Callable[[], AbstractContextManager[None]],
) -> list[Tensor]:
    """Return noised means over all ranks; each rank adds noise to its part of each bucket before others get it.

    While a rank draws the noise of a bucket, the sums of the next one are sent. While it fills a bucket, the means of
    another one are sent. Noise that keeps state gets the parts of all buckets in one call between the two.

    Args:
        sums: Clipped sums of this rank; the call empties the list.
        parameters: Parameters of the same shapes and strides.
        names: Names of the parameters.
        noised: Makes noised means of this rank's parts.
        group: The process group.
        reached: A context manager that names the step in errors of the collectives inside it.

    Returns:
        Views of the buckets, in the dtypes of the parameters.
    """
    count, ranks = len(sums), dist.get_world_size(group)
    whole: dict[int, Tensor] = {}
    todo = list(buckets(sums, parameters, ranks))
    # One collective at a time, since a second one would take memory for another bucket.
    sent = Started(reached)

    def scatter(bucket: Bucket) -> Tensor:
        flat = sums[-1].new_zeros(bucket.length)
        for place in bucket.places:
            place.view_in(flat).copy_(sums.pop())
        part = flat.new_empty(bucket.length // ranks)
        sent.wait()
        with reached():
            sent.start(reduce_scatter(part, flat, group), flat)
        return part

    def gather(bucket: Bucket, mean: Tensor) -> None:
        # Means are sent in the parameter's dtype, to which .grad would round them anyway.
        mean = mean.to(bucket.dtype)
        sent.wait()
        flat = mean.new_empty(bucket.length)
        with reached():
            sent.start(all_gather(flat, mean, group), mean)
        whole.update((place.index, place.view_in(flat)) for place in bucket.places)

    if noised.needs_all_sums:
        parts = [scatter(bucket) for bucket in todo]
        sent.wait()
        means = noised(parts, _places(todo, names, group), in_place=True)
        for bucket, mean in zip(todo, means, strict=True):
            gather(bucket, mean)
    else:
        previous: tuple[Bucket, Tensor] | None = None
        for bucket in todo:
            part = scatter(bucket)
            if previous is not None:
                gather(previous[0], *noised([previous[1]], names, in_place=True))
            previous = bucket, part
        sent.wait()
        if previous is not None:
            gather(previous[0], *noised([previous[1]], names, in_place=True))
    sent.wait()
    return [whole[index] for index in range(count)]


def _places(todo: Sequence[Bucket], names: Sequence[str], group: dist.ProcessGroup) -> list[str]:
    """Return what each bucket holds and where, and which part of it this rank noises."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return [
        f"part {rank + 1} of {ranks} of {bucket.length} values: "
        + ", ".join(f"{names[place.index]} from {place.start}" for place in bucket.places)
        for bucket in todo
    ]
