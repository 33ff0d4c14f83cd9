"""One fixed number of rows for batches of every size: a compiled graph knows no other."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def fixed_size(expected_batch_size: float) -> int:
    """Rows of the compiled graph for Poisson batches of this mean, if the user named none.

    Two standard deviations above the mean: 98 of 100 batches fit into one run of the graph. Smaller graphs waste
    fewer rows on padding and as much on running several times; at a mean of 32 to 256 samples everything between an
    eighth of the mean and this costs the same within a few percent (see ``docs/performance.md``).
    """
    return math.ceil(expected_batch_size + 2 * math.sqrt(expected_batch_size))


def is_channels_last(leaf: Tensor) -> bool:
    """Whether a batch leaf is laid out channels last, and not merely free of channels."""
    layout = _CHANNELS_LAST.get(leaf.dim())
    return (
        layout is not None and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=layout)
    )


def fitted(leaf: Tensor, size: int) -> Tensor:
    """A batch leaf with exactly ``size`` rows and the strides that the graph knows.

    Missing rows repeat the others: a row made of zeros might be one on which the loss is not finite.

    Args:
        leaf: ``[rows, ...]`` with ``1 <= rows <= size``.
        size: Rows of the graph.
    """
    layout = _CHANNELS_LAST[leaf.dim()] if is_channels_last(leaf) else torch.contiguous_format
    rows = leaf.shape[0]
    if rows < size:
        index = torch.arange(size, device=leaf.device) % rows
        leaf = leaf.index_select(0, index)
    leaf = leaf.contiguous(memory_format=layout)
    strides = _strides(leaf.shape, layout)
    if leaf.stride() == strides:
        return leaf
    return leaf.as_strided(leaf.shape, strides)  # axes of length one may have any stride


@functools.lru_cache(maxsize=256)
def _strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    """Of a new tensor."""
    return torch.empty(shape, device="meta", memory_format=layout).stride()


def fitted_batch(batch: Sequence[Any], size: int) -> list[Any]:
    """Every tensor of a flat batch with exactly ``size`` rows; constants stay."""
    return [fitted(leaf, size) if isinstance(leaf, Tensor) else leaf for leaf in batch]


def fitted_mask(mask: Tensor | None, rows: int, size: int, device: torch.device) -> Tensor:
    """Boolean ``[size]``: the samples that the caller marked, and the rows that were added; not to be written to."""
    added = _added_rows(rows, size, device)
    if mask is None:
        return added
    full = added.clone()
    full[:rows] |= mask.to(device)
    return full


@functools.lru_cache(maxsize=256)
def _added_rows(rows: int, size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and to be used outside of it
        return torch.arange(size, device=device) >= rows
