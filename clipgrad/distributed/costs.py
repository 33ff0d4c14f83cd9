"""What training on several ranks costs each of them: bytes that it holds, and bytes that it sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipgrad.distributed.buckets import buckets
from clipgrad.distributed.collectives import sends_by_gloo
from clipgrad.ranks import Cost


def of_replicas(
    parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype], group: dist.ProcessGroup
) -> tuple[Cost, ...]:
    """Costs of a rank that holds the whole model.

    Args:
        parameters: Those that are trained.
        dtypes: In which their sums are formed.
        group: The ranks.
    """
    ranks = dist.get_world_size(group)
    sums = [
        torch.empty(p.shape, dtype=dtype, device="meta")
        for p, dtype in zip(parameters, dtypes, strict=True)
    ]
    found = list(buckets(sums, parameters, ranks))
    widths = [sums[bucket.places[0].index].element_size() for bucket in found]
    lengths = [bucket.length for bucket in found]
    reduced = sum(length * width for length, width in zip(lengths, widths, strict=True))
    gathered = sum(b.length * b.dtype.itemsize for b in found)
    largest = max(length * width for length, width in zip(lengths, widths, strict=True))
    return (
        Cost("held", "sums of its own samples, until the step", sum(map(_bytes, sums))),
        Cost("held", "its part of the sums of all ranks, during the step", reduced // ranks),
        Cost("held", "buckets on their way, at most", _memories(group, parameters[0]) * largest),
        Cost("sent", "sums, for each step", _to_others(reduced, ranks)),
        Cost("sent", "noised means, for each step", _to_others(gathered, ranks)),
    )


class Gathered(NamedTuple):
    """A whole parameter of a sharded model, and the module that it is gathered with.

    Attributes:
        whole: The parameter; it needs no memory.
        module: Number of the module.
        sum_dtype: In which its sum is formed; None if it is not trained.
    """

    whole: Tensor
    module: int
    sum_dtype: torch.dtype | None


def of_shards(
    parameters: Sequence[Gathered],
    root: int | None,
    mesh: tuple[int, int],
    group: dist.ProcessGroup,
    *,
    streams: bool,
    whole_sums: bool,
) -> tuple[Cost, ...]:
    """Costs of a rank that holds a shard of each parameter.

    Args:
        parameters: All of the model.
        root: Number of the module whose parameters stay whole.
        mesh: Number of replicas of a shard, and of shards.
        group: The ranks.
        streams: Whether a module is whole only while it computes.
        whole_sums: Whether sums stay whole until the batch ends.
    """
    replicas, shards = mesh
    wholes: Counter[int] = Counter()
    sums: Counter[int] = Counter()
    for whole, module, dtype in parameters:
        # FSDP cuts the first axis into pieces of equal size, the last ones padded.
        rows = shards * -(-whole.shape[0] // shards) if whole.dim() else shards
        elements = rows * prod(whole.shape[1:])
        wholes[module] += elements * whole.element_size()
        sums[module] += 0 if dtype is None else elements * dtype.itemsize
    of_root = wholes.pop(root, 0) if root is not None else 0
    largest = sorted(wholes.values())
    # Two are kept in the backward pass, while the next one comes.
    at_once = of_root + sum(largest[-3:] if streams else largest)
    passes = 2 if streams else 1
    own = sum(sums.values()) // shards
    costs = [Cost("held", "its shards of the sums", own)]
    if whole_sums:
        costs.append(
            Cost("held", "sums of its own samples, until the batch ends", sum(sums.values()))
        )
    costs += [
        Cost("held", "whole parameters at once, at most", at_once),
        Cost("held", "sums on their way, at most", _memories(group, parameters[0].whole) * max(sums.values())),
        Cost("sent", "parameters of the root, for each backward", _to_others(of_root, shards)),
        Cost("sent", f"other parameters, for each {'microbatch' if streams else 'backward'}",
             _to_others(passes * sum(largest), shards)),
        Cost("sent", f"sums, for each {'backward' if whole_sums else 'microbatch'}",
             _to_others(sum(sums.values()), shards)),
    ]  # fmt: skip
    if replicas > 1:
        costs.append(
            Cost("sent", "sums and means between replicas, for each step", _to_others(2 * own, replicas))
        )  # fmt: skip
    return tuple(costs)


def _memories(group: dist.ProcessGroup, like: Tensor) -> int:
    """How many times a piece of sums is in memory: formed, on its way, and with gloo as received."""
    return 3 if sends_by_gloo(like.device, group) else 2


def _to_others(size: int, ranks: int) -> int:
    """What a rank sends if everybody keeps or has its own part."""
    return size * (ranks - 1) // ranks


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
