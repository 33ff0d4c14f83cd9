"""Decide how many rows a compiled graph has: every number in a range, a few numbers, or one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def fixed_size(expected_batch_size: float) -> int:
    """Return how many samples run at once on a compiled graph for Poisson batches of this mean size.

    It is two standard deviations above the mean, so that 98 of 100 batches are one run.
    """
    return math.ceil(expected_batch_size + 2 * math.sqrt(expected_batch_size))


@dataclass(frozen=True)
class Rows:
    """This class says how many rows a compiled graph has: every number in a range, a few numbers, or one.

    Attributes:
        fewest: The smallest number of rows; batches of fewer samples are padded to it.
        most: The largest number.
        few: The only numbers to which batches are padded, in ascending order; empty if every number is one.
    """

    fewest: int
    most: int
    few: tuple[int, ...] = ()

    @property
    def are_symbolic(self) -> bool:
        """Return whether the graph has a symbol for its rows."""
        return self.fewest < self.most

    def at_once(self, batch_size: int) -> int:
        """Return how many samples of a batch run at once: as few runs as possible, equal if they may be."""
        if not self.are_symbolic or batch_size <= 0:
            return self.most
        return math.ceil(batch_size / math.ceil(batch_size / self.most))

    def padded(self, count: int) -> int:
        """Return the number of rows to which ``count`` samples are padded."""
        least = max(count, self.fewest)
        return next((size for size in self.few if size >= least), least)


@functools.lru_cache(maxsize=256)
def recorded_sizes(most: int, apart: float = 0.4) -> tuple[int, ...]:
    """Return to which numbers of rows Poisson batches are padded, if each number needs a recording.

    All but one lie within two standard deviations of the mean. Two fifths of one apart, up to 20 recordings serve
    nearly all batches, and padding adds at most 0.2 standard deviations on average: 2 % for a mean of 64. One number is
    for the halves of batches that are too large to run at once.

    Args:
        most: The largest number, as ``fixed_size`` returns it.
        apart: The largest distance of two numbers, in standard deviations.
    """
    deviation = math.sqrt(most + 1) - 1
    half = math.ceil((most + deviation) / 2)
    least, step = most - math.floor(4 * deviation), max(1, int(deviation * apart))
    return tuple(sorted({half, *range(most, max(least, 1) - 1, -step)}))


def is_channels_last(leaf: Tensor) -> bool:
    """Return whether a batch leaf has channels-last layout and is not contiguous as well (as with one channel)."""
    layout = _CHANNELS_LAST.get(leaf.dim())
    return (
        layout is not None and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=layout)
    )


def layout_of(leaf: Tensor) -> torch.memory_format:
    """Return the memory format in which a batch leaf is given to a compiled graph."""
    return _CHANNELS_LAST[leaf.dim()] if is_channels_last(leaf) else torch.contiguous_format


def pad_rows(leaf: Tensor, size: int) -> Tensor:
    """Return a batch leaf with exactly ``size`` rows and the strides for which the graph was compiled.

    Missing rows repeat existing rows (at least one); the loss of a row of zeros might not be finite.
    """
    layout = layout_of(leaf)
    rows = leaf.shape[0]
    if rows < size:
        leaf = leaf.index_select(0, _repeated_rows(rows, size, leaf.device, _stream(leaf.device)))
    leaf = leaf.contiguous(memory_format=layout)
    strides = _strides(leaf.shape, layout)
    if leaf.stride() == strides:
        return leaf
    return leaf.as_strided(leaf.shape, strides)  # axes of length one may have any stride


@functools.lru_cache(maxsize=256)
def _repeated_rows(rows: int, size: int, device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor is also used outside inference mode
        return torch.arange(size, device=device) % rows


@functools.lru_cache(maxsize=256)
def _strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    """Return the strides of a new tensor."""
    return torch.empty(shape, device="meta", memory_format=layout).stride()


def pad_batch(batch: Sequence[Any], size: int) -> list[Any]:
    """Return a flat batch in which every tensor has exactly ``size`` rows; constants do not change."""
    return [pad_rows(leaf, size) if isinstance(leaf, Tensor) else leaf for leaf in batch]


def pad_mask(mask: Tensor | None, rows: int, size: int, device: torch.device) -> Tensor:
    """Return a cached boolean mask ``[size]`` of the caller's padding and of added rows; do not write to it."""
    added = _added_rows(rows, size, device, _stream(device))
    if mask is None:
        return added
    full = added.clone()
    full[:rows] |= mask.to(device)
    return full


def _stream(device: torch.device) -> int:
    """Return the stream on which cached tensors are made; other streams would not wait for them."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=256)
def _added_rows(rows: int, size: int, device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor is also used outside inference mode
        return torch.arange(size, device=device) >= rows
