"""Compute the recurrence of correlated noise by loops in C, which are verified before use and need a C compiler."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgrad.noise import c_loop
from clipgrad.noise.block import correlate_by_torch
from clipgrad.noise.c_loop import compile_library

SOURCE = Path(__file__).with_name("recurrence.c")
_log = logging.getLogger("clipgrad")
_found: list[ctypes.CDLL | None] = []


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
        assert is_plain(ring[0])
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


def is_plain(tensor: Tensor) -> bool:
    """Return whether the loops in C can read and write the tensor by its address."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype is torch.float32
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_inference()
    )


def compiled_loops() -> ctypes.CDLL | None:
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
