"""Make the rows of banded correlated noise on one device, and keep the rows of past steps."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgrad.noise import c_loop
from clipgrad.noise.c_loop import CAPACITY, compile_library
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.system import SystemNoise, is_plain_system_noise

SOURCE = Path(__file__).with_name("recurrence.c")
_SMALL = 2**15  # values
_PAGE, _PAD = 1024, 48  # values
_TILE = 128  # columns that the loop in C takes at once
_log = logging.getLogger("clipgrad")
_found: list[ctypes.CDLL | None] = []


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

    def next(self, source: NoiseSource, scale: float) -> list[Tensor]:
        """Return the row of the next step as one tensor for each shape; the next call may overwrite them."""
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
        indices = range(self._first - self._known, self._first)
        return [self._ring[index % len(self._ring)] for index in indices]

    def _make(self, source: NoiseSource, scale: float) -> None:
        compiled = _compiled() if _is_plain(self._ring[0]) else None
        place = (self._tail, self._first, self._ahead, self._known)
        if compiled is not None and scale and is_plain_system_noise(source):
            self._make_in_turns(source, scale, Correlate(compiled, self._ring, *place))
            return
        count = len(self._ring)
        fresh = [self._ring[(self._first + k) % count] for k in range(self._ahead)]
        torch._foreach_zero_(fresh)
        source.add_gaussian_(fresh, scale)
        if compiled is None:
            correlate_by_torch(self._ring, *place)
        else:
            Correlate(compiled, self._ring, *place)(0, self._ring.shape[1])

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


def correlate_by_torch(
    ring: Tensor, tail: Sequence[float], first: int, ahead: int, known: int
) -> None:
    """Subtract the weighted earlier rows from each of ``ahead`` rows, beginning with row ``first`` of the ring.

    The code adds whole rows, since PyTorch's settings may lower the precision of a matrix product.

    Args:
        ring: The rows, ``[rows, values]``; row 0 follows the last row.
        tail: Weights of earlier rows, latest row first.
        first: Index of the first row to change.
        ahead: Number of rows to change.
        known: Number of rows before row ``first`` that hold past noise.
    """
    for k in range(ahead):
        row = ring[(first + k) % len(ring)]
        for lag, weight in enumerate(tail[: k + known], start=1):
            row.add_(ring[(first + k - lag) % len(ring)], alpha=-weight)


class Correlate:
    """This loop in C computes ``correlate_by_torch`` for float32 on a CPU, and for some columns of the ring.

    Args:
        loops: The compiled library.
        ring: The rows, whose values lie one after the other; the loop writes to them by address.
        tail: Weights of earlier rows, latest row first.
        first: Index of the first row to change.
        ahead: Number of rows to change.
        known: Number of rows before row ``first`` that hold past noise.
    """

    def __init__(
        self,
        loops: ctypes.CDLL,
        ring: Tensor,
        tail: Sequence[float],
        first: int,
        ahead: int,
        known: int,
    ) -> None:
        assert _is_plain(ring[0])
        assert ring.stride(1) == 1
        numbers = (ring.stride(0), len(ring), first, ahead, known, len(tail))
        weights = (ctypes.c_float * max(1, len(tail)))(*tail)
        self._loop, self._ring, self._start = loops.clipgrad_correlate, ring, ring.data_ptr()
        self._arguments = (*map(ctypes.c_int64, numbers), weights)

    def __call__(self, start: int, width: int, fresh: Tensor | None = None) -> None:
        """Change ``width`` columns from column ``start`` on.

        Args:
            start: The first column.
            width: How many columns.
            fresh: Independent values, ``ahead`` rows of ``width`` one after the other, which the rows are made of. If
                it is None, the rows themselves hold them.
        """
        assert 0 <= start <= start + width <= self._ring.shape[1]
        self._loop(
            ctypes.c_void_p(self._start + self._ring.element_size() * start),
            *self._arguments,
            ctypes.c_int64(width),
            ctypes.c_void_p(None if fresh is None else fresh.data_ptr()),
            ctypes.c_int64(width),
        )


def add_and_divide(sums: list[Tensor], noise: list[Tensor], divisor: float) -> None:
    """Compute ``(sums + noise) / divisor`` in place, rounded after each of the two."""
    # For small tensors a call of the loop costs more than PyTorch's second pass over memory.
    large = sum(map(Tensor.numel, sums)) > _SMALL * len(sums)
    loops = _compiled() if large and all(map(_is_plain, sums)) else None
    if loops is None or not all(map(_is_plain, noise)):
        torch._foreach_add_(sums, noise)
        torch._foreach_div_(sums, divisor)
        return
    for total, row in zip(sums, noise, strict=True):
        loops.clipgrad_add_and_divide(
            ctypes.c_void_p(total.data_ptr()),
            ctypes.c_void_p(row.data_ptr()),
            ctypes.c_int64(total.numel()),
            ctypes.c_float(divisor),
        )
        torch.autograd.graph.increment_version(total)


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype is torch.float32
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_inference()
    )


def _compiled() -> ctypes.CDLL | None:
    """Return the loops in C, compiled and tested once in a process, or None if that fails."""
    with c_loop._compiling, torch.inference_mode(False), torch.no_grad():
        if not _found:
            try:
                loops = compile_library(SOURCE.read_text(encoding="utf-8"))
                prove(loops)
                _found.append(loops)
            # A compiler can fail in any way, and PyTorch's operations compute the same.
            except Exception as error:
                _log.info(
                    "Correlated noise is made without a C compiler, which is slower: %s", error
                )
                _found.append(None)
    return _found[0]


def prove(loops: ctypes.CDLL) -> None:
    """Compare the loops in C with PyTorch's operations.

    Raises:
        RuntimeError: If a value differs by more than rounding.
    """
    tail = [0.75, 0.5, -0.25, 0.125]
    for first, known, width in ((0, 0, 700), (5, 4, 300), (3, 2, 1)):
        start = torch.arange(7 * (width + 3), dtype=torch.float32, device="cpu").remainder(11.0) - 5
        rings = [start.view(7, -1).clone() for _ in range(2)]
        correlate_by_torch(rings[0][:, 2 : 2 + width], tail, first, 3, known)
        columns = rings[1][:, 2 : 2 + width]
        if known < 4:
            Correlate(loops, columns, tail, first, 3, known)(0, width)
        else:  # the same values, given beside the ring
            fresh = torch.stack([columns[(first + k) % 7] for k in range(3)])
            for k in range(3):
                columns[(first + k) % 7].fill_(torch.nan)
            Correlate(loops, columns, tail, first, 3, known)(0, width, fresh)
        means = start.clone()
        loops.clipgrad_add_and_divide(
            ctypes.c_void_p(means.data_ptr()),
            ctypes.c_void_p(rings[1].data_ptr()),
            ctypes.c_int64(len(means)),
            ctypes.c_float(3.0),
        )
        expected = (start + rings[1].flatten()) / 3.0
        # A negated "<=" refuses NaN too.
        if not ((rings[0] - rings[1]).abs() <= 1e-5).all() or not torch.equal(means, expected):
            raise RuntimeError("the compiled loops and PyTorch compute different values")
