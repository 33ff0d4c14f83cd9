"""Make the rows of banded correlated noise on one device, and keep the rows of past steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipgrad.noise.block import Block, correlate
from clipgrad.noise.c_loop import CAPACITY
from clipgrad.noise.recurrence import Correlate, compiled_loops, is_plain
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.streams import InOrder
from clipgrad.noise.system import SystemNoise, is_plain_system_noise

_PAGE, _PAD = 1024, 48  # values
_TILE = 128  # columns that the loop in C takes at once


class Rows:
    """This class makes rows of ``C^-1 Z``, one for each step, for all values of one device and dtype.

    Row t is ``z_t - c_1 row_{t-1} - c_2 row_{t-2} - ...``. The rows of several steps are made together, so that each
    past row is read once for all of them. A ring buffer holds these rows and the past rows.

    Args:
        tail: Coefficients of C after the first coefficient, which is 1.
        past: Rows of past steps, oldest first; at most ``len(tail)`` rows.
        shapes: Shapes of the tensors that share a row, in their order in the row.
        like: A tensor with the device and dtype of the rows.
        ahead: Number of rows to make at once.
    """

    def __init__(
        self,
        tail: Sequence[float],
        past: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        like: Tensor,
        ahead: int,
    ) -> None:
        self._tail, self._ahead, self._shapes = list(tail), ahead, list(shapes)
        self._views: dict[int, list[Tensor]] = {}
        size = sum(map(math.prod, shapes))
        with torch.inference_mode(False):
            # Rows whose distance is a multiple of a page would fall into the same sets of the cache.
            padded = size + (_PAD - size) % _PAGE
            ring = torch.empty((len(tail) + ahead, padded), dtype=like.dtype, device=like.device)
            self._ring = ring[:, :size]
            for index, row in enumerate(past):
                self._ring[index].copy_(row)
        self._known = len(past)
        self._first = len(past)
        """Index of the next row in the ring."""
        self._left = 0
        """Number of rows that are made and not used yet."""
        self._order = InOrder(ring)

    def next(self, source: NoiseSource, scale: float) -> list[Tensor]:
        """Return the row of the next step as one tensor for each shape; the next call may overwrite them.

        Raises:
            RuntimeError: If a CUDA graph is captured.
        """
        self._order.enter()
        if not self._left:
            self._make(source, scale)
            self._left = self._ahead
        row = self._cut(self._first)
        self._first = (self._first + 1) % len(self._ring)
        self._known = min(self._known + 1, len(self._tail))
        self._left -= 1
        return row

    def _cut(self, index: int) -> list[Tensor]:
        """Return views of a row; they are cached, since many small views take long to make."""
        if index not in self._views:
            parts = self._ring[index].split([math.prod(shape) for shape in self._shapes])
            self._views[index] = [
                part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)
            ]
        return self._views[index]

    def past(self) -> list[Tensor]:
        """Return the past rows on which later rows depend, oldest first, without the rows made ahead."""
        self._order.enter()
        indices = range(self._first - self._known, self._first)
        return [self._ring[index % len(self._ring)] for index in indices]

    def _make(self, source: NoiseSource, scale: float) -> None:
        block = Block(self._ring, self._tail, self._first, self._ahead, self._known)
        plain = source if scale and is_plain_system_noise(source) else None
        loops = compiled_loops() if is_plain(self._ring[0]) else None
        if plain is not None and loops is not None:
            self._make_in_turns(plain, scale, Correlate(loops, *block))
            return
        if plain is not None and plain._rows(block, scale):
            return
        fresh = [self._ring[index] for index in block.new()]
        torch._foreach_zero_(fresh)
        source.add_gaussian_(fresh, scale)
        if loops is None:
            correlate(block)
        else:
            Correlate(loops, *block)(0, self._ring.shape[1])

    def _make_in_turns(self, source: SystemNoise, scale: float, correlate: Correlate) -> None:
        """Make all rows for some columns after the other, so that fresh noise never leaves the cache."""
        size = self._ring.shape[1]
        width = _width(self._ahead)
        widths = [min(width, size - start) for start in range(0, size, width)]

        def use(turn: int, fresh: Tensor) -> None:
            correlate(turn * width, widths[turn], fresh)

        source._in_turns([self._ahead * width for width in widths], scale, use)


def _width(rows: int) -> int:
    """Return how many columns to make at once: their fresh noise takes two pieces of the loop that makes it.

    It is an odd number of tiles, since rows a multiple of a page apart would compete for the same places in the cache.
    """
    tiles = 2 * CAPACITY // (rows * _TILE)
    return max(1, tiles - 1 + tiles % 2) * _TILE
