"""Lay many tensors out in flat buckets, each of which is split into one part for each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The start of a collective costs little beside a bucket of this size. A small model has eight buckets, since up to
# three more buckets than sums are in memory.
_BUCKET_BYTES, _EIGHTH, _LEAST_BYTES = 2**25, 8, 2**22
# Each tensor starts at a multiple of this many elements, for vectorised kernels.
_ALIGNED = 16


@dataclass(frozen=True)
class Place:
    """This class says where a tensor is in its bucket.

    Attributes:
        index: Position of the tensor in the list of all tensors.
        start: Index of the tensor's first element in the bucket.
        like: A tensor of the same shape and strides.
    """

    index: int
    start: int
    like: Tensor

    def view_in(self, flat: Tensor) -> Tensor:
        """Return the tensor as a view of the bucket ``flat``."""
        like = self.like
        if _is_dense(like):
            return flat.as_strided(like.shape, like.stride(), self.start)
        return flat[self.start : self.start + like.numel()].view(like.shape)


@dataclass(frozen=True)
class Bucket:
    """This class describes tensors of one dtype that one collective sends together.

    Attributes:
        places: Place of each tensor; the last tensor of the model comes first.
        length: Number of elements of the bucket, a multiple of the number of ranks.
        dtype: Dtype of the parameters, in which means are sent.
    """

    places: tuple[Place, ...]
    length: int
    dtype: torch.dtype


def buckets(sums: Sequence[Tensor], parameters: Sequence[Tensor], ranks: int) -> Iterator[Bucket]:
    """Yield buckets of all tensors, from the last tensor to the first.

    Args:
        sums: Clipped sums.
        parameters: Parameters of the same shapes, strides and order.
        ranks: Number of equal parts of a bucket.
    """
    places: list[Place] = []
    length = 0
    everything = sum(total.numel() * total.element_size() for total in sums)
    enough = min(_BUCKET_BYTES, max(everything // _EIGHTH, _LEAST_BYTES))
    kind: tuple[object, ...] = ()
    for index in range(len(sums) - 1, -1, -1):
        total, parameter = sums[index], parameters[index]
        now = (total.dtype, total.device, parameter.dtype)
        full = length * total.element_size() >= enough
        if places and (now != kind or full):
            yield _bucket(places, length, ranks, parameters)
            places, length = [], 0
        kind = now
        places.append(Place(index, length, parameter.detach()))
        length += -(-total.numel() // _ALIGNED) * _ALIGNED
    if places:
        yield _bucket(places, length, ranks, parameters)


def _bucket(places: list[Place], length: int, ranks: int, parameters: Sequence[Tensor]) -> Bucket:
    length = max(length, 1)
    return Bucket(tuple(places), -(-length // ranks) * ranks, parameters[places[0].index].dtype)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the tensor's elements fill its memory without gaps or overlaps, in any order."""
    expected = 1
    sizes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in sizes:
        if size == 0:
            return False
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
