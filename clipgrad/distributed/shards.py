"""Sum clipped sums of sharded parameters: one reduce-scatter for each module, in the layout of FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from clipgrad.distributed.collectives import Started, reduce_scatter
from clipgrad.distributed.fsdp import shard_of


class Keys(NamedTuple):
    """These functions map a whole parameter to its sharded parameter and to the number of its module."""

    sharded: Callable[[Tensor], DTensor]
    group: Callable[[Tensor], int]


def scattered(
    totals: Iterator[Tensor],
    parameters: Sequence[Tensor],
    keys: Keys,
    reached: Callable[[], AbstractContextManager[None]],
) -> list[Tensor]:
    """Return sums over the ranks of each shard; replicas of a shard are not added up yet.

    Args:
        totals: Sums of this rank, computed one by one. The sums of a module are sent together and then freed.
        parameters: The whole parameters.
        keys: Functions that find a parameter's shard and module.
        reached: A context manager that names the step in errors of the collectives inside it.
    """
    found: list[Tensor] = []
    sent = Started(reached)
    waiting: list[Tensor] = []
    placed: list[DTensor] = []
    now: tuple[Any, ...] = ()

    def send() -> None:
        if not waiting:
            return
        # The sums of a module are formed while those of the previous module are sent.
        sent.wait()
        with reached():
            found.extend(_sent(waiting, placed, sent))
        waiting.clear()
        placed.clear()

    for parameter in parameters:
        total = next(totals)  # zip would keep the one before it alive
        sharded = keys.sharded(parameter)
        key = (keys.group(parameter), total.dtype, sharded.device_mesh, sharded.placements)
        if key != now:
            send()
        now = key
        waiting.append(total)
        placed.append(sharded)
        del total
    send()
    sent.wait()
    return found


def _sent(totals: Sequence[Tensor], parameters: Sequence[DTensor], sent: Started) -> list[Tensor]:
    """Start to send the sums of one module, and return the shards that will hold the results."""
    mesh = parameters[0].device_mesh
    wanted: list[Placement] = [
        Partial("sum") if isinstance(placement, Replicate) else placement
        for placement in parameters[0].placements
    ]
    along = wanted[-1]
    if not (isinstance(along, Shard) and along.dim == 0 and type(along) is Shard):
        terms = [
            DTensor.from_local(total, mesh, [Partial("sum")] * mesh.ndim, run_check=False)
            for total in totals
        ]
        return [term.redistribute(placements=wanted) for term in terms]
    ranks = mesh.size(mesh.ndim - 1)
    # FSDP splits the first axis into chunks of one size, with the operation below; the last ones may be padded.
    rows = [-(-total.shape[0] // ranks) for total in totals]
    widths = [row * prod(total.shape[1:]) for row, total in zip(rows, totals, strict=True)]
    flat = totals[0].new_empty(ranks, sum(widths))
    if filled := [total for total in totals if total.numel()]:
        torch._chunk_cat(filled, 0, ranks, out=flat)
    part = flat.new_empty(flat.shape[1])
    sent.start(reduce_scatter(part, flat.view(-1), mesh.get_group(mesh.ndim - 1)), flat)
    found: list[Tensor] = []
    for piece, parameter in zip(part.split(widths), parameters, strict=True):
        shape = parameter.to_local().shape
        found.append(shard_of(piece[: shape.numel()].view(shape), parameter, wanted))
    return found
