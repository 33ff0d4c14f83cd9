"""Launch the kernels for correlated noise on a CUDA device, and run their self-tests. It needs Triton."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton.language as tl
from torch import Tensor

from clipgrad.kernels import chacha_selftest as selftest
from clipgrad.kernels import correlated_kernels as kernels
from clipgrad.kernels.device_calls import COLUMNS, DeviceCalls

_BLOCK = selftest.BLOCKS_AT_ONCE
_ENOUGH_PROGRAMS = 2**13
_LARGEST_CHUNK = 2**15  # columns
_BLOCKS = 2**32  # RFC 8439 counts blocks in 32 bits
_ONE = 1  # must not be a constant in the kernel
_ADDED, _ADDED_AT_ONCE = 2**14, 2**10  # values of a program
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_SCALE, _DIVISOR = 3.0, 7.0
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class Block(Protocol):
    """This protocol is what the kernel needs of ``noise.block.Block``, which says which rows of a ring are made."""

    @property
    def ring(self) -> Tensor: ...
    @property
    def first(self) -> int: ...
    @property
    def ahead(self) -> int: ...
    @property
    def known(self) -> int: ...


class _Tested(NamedTuple):
    ring: Tensor
    first: int
    ahead: int
    known: int


class TritonRows(DeviceCalls):
    """This class makes rows of correlated noise on one device, always as many at once.

    Args:
        tail: Weights of earlier rows, latest row first.
        ahead: Number of new rows, a power of two and at most the values of a block of the cipher.
        like: A tensor with the device and dtype of the rows, float32 or float64.
        draws: Number of Gaussians in each value.
    """

    def __init__(self, tail: Sequence[float], ahead: int, like: Tensor, draws: int) -> None:
        super().__init__(like.device)
        self._ahead, self._dtype, self._draws = ahead, like.dtype, draws
        self._lags = len(tail)
        self._per_block = selftest.PER_BLOCK[like.dtype]
        assert self._per_block % ahead == 0, "a block of the cipher fills whole columns"
        weights = torch.tensor([*tail, *([0.0] * 2 * ahead)], dtype=like.dtype, device="cpu")
        with torch.inference_mode(False):
            self._tail = weights.to(like.device)
        self._compiled: Any = None

    def limit(self) -> int:
        """Return the largest number of columns for one key."""
        return _BLOCKS // 4 * (self._per_block // self._ahead) // self._draws

    def make(self, block: Block, columns: tuple[int, int], sigma: float, key: bytes) -> None:
        """Make new rows from fresh noise and the rows before, from one column up to another.

        The key is used for nothing else.
        """
        ring, (start, end) = block.ring, columns
        assert (ring.dtype, ring.stride(1)) == (self._dtype, 1), "the kernel gets an address only"
        assert block.ahead == self._ahead, "the kernel makes another number of rows"
        assert block.known <= self._lags, "there are no weights for so many rows"
        assert 0 <= start <= end <= ring.shape[1], "the kernel would write beyond the ring"
        chunk = _BLOCK * self._per_block // self._ahead
        while chunk < _LARGEST_CHUNK and end - start > chunk * _ENOUGH_PROGRAMS:
            chunk *= 2
        programs = -(-(end - start) // chunk)
        if programs * chunk // (self._per_block // self._ahead) * self._draws > _BLOCKS:
            raise RuntimeError(f"One key makes {self.limit()} columns, and not {end - start}.")
        if not programs:
            return
        bits = struct.unpack("<5q", struct.pack("<d", sigma / math.sqrt(self._draws)) + key)
        arguments = (
            ring, self._tail, ring.stride(0), len(ring), block.first, block.known, start, end, chunk, *bits, _ONE,
            self._draws, _TYPES[self._dtype], self._per_block, self._ahead, _BLOCK,
        )  # fmt: skip
        with self._on_device():
            self._stream()
            if self._compiled is None:
                self._compiled = kernels.make_rows[(programs,)](*arguments)
            else:
                self._compiled[(programs, 1, 1)](*arguments)

    def self_test(self) -> None:
        """Raise RuntimeError unless rows agree with the CPU's: the first rows, full blocks, and the end of the ring."""
        lags = self._lags
        size = 2 * _BLOCK * self._per_block // self._ahead + 1
        count = lags + self._ahead
        for first, known in ((0, 0), (count - 1, lags), (1, min(lags, 1))):
            # Columns at the sides stay as they are. NaN is where no row was.
            ring = torch.full((count, size + 4), math.nan, dtype=self._dtype)
            for age in range(1, known + 1):
                ring[first - age] = torch.arange(size + 4).remainder(7 + age) - 3.0
            expected = ring.double()
            weights = self._tail[:lags].tolist()
            _expect(expected[:, 1 : size + 1], weights, first, known, self._fresh(size))
            found = ring.to(self._device)
            block = _Tested(found, first, self._ahead, known)
            self.make(block, (1, size + 1), _SCALE, selftest.RFC_KEY)
            error = (found.cpu().double() - expected).abs()
            agree = (error <= _TOLERANCE[self._dtype]) | (found.cpu().isnan() & expected.isnan())
            if not agree.all():
                raise RuntimeError("the device makes other rows of correlated noise than the CPU")

    def _fresh(self, size: int) -> Tensor:
        """Return the fresh noise of a public key as the CPU computes it, ``[ahead, size]``."""
        columns = self._per_block // self._ahead
        rounds = -(-size // (columns * _BLOCK))
        values = selftest.gaussians(
            selftest.RFC_KEY, rounds * self._per_block * _BLOCK, self._draws, self._dtype
        )
        parts = torch.from_numpy(_SCALE * values).view(rounds, columns, self._ahead, _BLOCK)
        return parts.permute(2, 0, 1, 3).reshape(self._ahead, -1)[:, :size]


def _expect(ring: Tensor, tail: list[float], first: int, known: int, fresh: Tensor) -> None:
    """Write the rows that the fresh noise makes to the ring."""
    for k, row in enumerate(fresh):
        total = row.clone()
        for lag, weight in enumerate(tail[: k + known], start=1):
            total -= weight * ring[(first + k - lag) % len(ring)]
        ring[(first + k) % len(ring)] = total


class TritonSums(DeviceCalls):
    """This class computes ``(sums + row) / divisor`` on one device, with one launch for each dtype of the sums."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._compiled: dict[tuple[torch.dtype, torch.dtype], Any] = {}

    def add(
        self, sums: list[Tensor], noise: list[Tensor], divisor: float, into: list[Tensor]
    ) -> None:
        """Write the quotients to ``into``, which may be ``sums``. All tensors are contiguous.

        Args:
            sums: Tensors of any floating-point dtypes.
            noise: Tensors of the same sizes and of one dtype, which are views of one tensor.
            divisor: Sums are multiplied by its rounded inverse, as in CUDA's division by a number.
            into: Tensors of the same sizes and dtypes as ``sums``.
        """
        given = [three for three in zip(sums, noise, into, strict=True) if three[0].numel()]
        assert all(s.numel() == n.numel() == t.numel() for s, n, t in given), "not alike"
        (factor,) = struct.unpack("<q", struct.pack("<d", 1.0 / divisor))
        with self._on_device():
            stream = self._stream()
            for dtype in dict.fromkeys(source.dtype for source, _, _ in given):
                alike = [three for three in given if three[0].dtype is dtype]
                assert all(target.dtype is dtype for _, _, target in alike), "not alike"
                row = alike[0][1]
                tables = self._tables_of(stream, alike)
                arguments = (
                    *tables, row, factor, _TYPES[dtype], _TYPES[row.dtype], _ADDED_AT_ONCE,
                )  # fmt: skip
                programs = len(tables[0]) // COLUMNS
                kernel = self._compiled.get((dtype, row.dtype))
                if kernel is None:
                    launched = kernels.add_row[(programs,)](*arguments)
                    self._compiled[dtype, row.dtype] = launched  # None in Triton's interpreter
                else:
                    kernel[(programs, 1, 1)](*arguments)

    def _tables_of(self, stream: int, alike: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """Return the tables of sources, of targets, and of the places of their noise in the row."""
        first, itemsize = int(alike[0][1].storage_offset()), alike[0][0].itemsize
        sizes = tuple(source.numel() for source, _, _ in alike)
        columns = (
            (tuple(source.data_ptr() for source, _, _ in alike), itemsize),
            (tuple(target.data_ptr() for _, _, target in alike), itemsize),
            (tuple(int(noise.storage_offset()) - first for _, noise, _ in alike), 1),
        )
        return [self._table(stream, starts, sizes, _ADDED, size) for starts, size in columns]

    def self_test(self) -> None:
        """Raise RuntimeError unless sums agree with those of two operations."""
        for dtype in (torch.float32, torch.bfloat16):
            sizes = [1, _ADDED + 3, 5]
            noise = torch.arange(sum(sizes) + 1, dtype=torch.float32).remainder(13.0)
            row = noise.to(self._device)[1:].split(sizes)
            sums = [torch.full((size,), 2.5, dtype=dtype, device=self._device) for size in sizes]
            into = [torch.full_like(total, math.nan) for total in sums]
            self.add(sums, list(row), _DIVISOR, into)
            for total, part in zip(into, noise[1:].split(sizes), strict=True):
                expected = (2.5 + part.double()) / _DIVISOR
                error = (total.cpu().double() - expected).abs()
                if not (error <= torch.finfo(dtype).eps * expected).all():
                    raise RuntimeError("the device adds a row of noise to sums wrongly")
