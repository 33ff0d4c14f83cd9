"""This module launches the kernels for ChaCha20 noise on a CUDA device, and runs their self-test. It needs Triton."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from clipgrad.kernels import chacha_kernels as kernels
from clipgrad.kernels import chacha_selftest as selftest
from clipgrad.kernels.device_calls import COLUMNS, DeviceCalls

_BLOCK = selftest.BLOCKS_AT_ONCE
_LARGEST_CHUNK = 2**16
_ENOUGH_PROGRAMS = 2**13
_COUNTERS = 2**32  # RFC 8439 counts blocks in 32 bits
_ONE = 1  # must not be a constant in the kernel
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class TritonChaCha(DeviceCalls):
    """This class adds noise on one device, with one launch per dtype for any number of tensors.

    A launch reads the tensors' addresses from tables on the device. Compiled kernels are cached, because Triton's
    lookup is slower than the launch.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._compiled: dict[tuple[torch.dtype, int], Any] = {}

    def limit(self, draws: int) -> int:
        """Return the largest number of values for one key: a quarter of its blocks, because some blocks stay unused."""
        return _COUNTERS // 4 * min(selftest.PER_BLOCK.values()) // draws

    def add_gaussian_(
        self,
        tensors: list[Tensor],
        sigma: float,
        draws: int,
        key: bytes,
        divisor: float = 1.0,
        into: list[Tensor] | None = None,
    ) -> None:
        """Add ``N(0, sigma^2)``, each value the scaled sum of ``draws`` values, and divide the sums.

        Tensors have no gaps in memory (contiguous up to the order of axes). The key is used for nothing else. Sums are
        multiplied by the rounded inverse of ``divisor``, as in CUDA's division by a number. Results are written in
        place or to ``into``, tensors with equal sizes and dtypes, which overlap no other tensor of either list. After
        a RuntimeError, tensors of the dtypes that are not launched yet are unchanged.
        """
        both = zip(tensors, tensors if into is None else into, strict=True)
        filled = [pair for pair in both if pair[0].numel()]
        # The kernel receives only addresses and the sizes of the sources.
        assert all(s.numel() == t.numel() and s.dtype is t.dtype for s, t in filled), "not alike"
        dtypes = dict.fromkeys([source.dtype for source, _ in filled])
        first, scaling = 0, struct.pack("<dd", sigma / math.sqrt(draws), 1.0 / divisor)
        with self._on_device():
            stream = self._stream()
            for dtype in dtypes:
                alike = [p for p in filled if p[0].dtype is dtype] if len(dtypes) > 1 else filled
                sources, targets = zip(*alike, strict=True)
                where = (
                    stream,
                    dtype,
                    tuple(map(Tensor.data_ptr, sources)),
                    tuple(map(Tensor.data_ptr, targets)),
                    tuple(map(Tensor.numel, sources)),
                )
                first = self._launch(where, scaling, draws, key, first)

    def _launch(
        self,
        where: tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        scaling: bytes,
        draws: int,
        key: bytes,
        first: int,
    ) -> int:
        """Add noise to tensors of one dtype from block ``first`` on, and return the first unused block."""
        stream, dtype, sources, targets, sizes = where
        per_block = selftest.PER_BLOCK[torch.float64 if dtype is torch.float64 else torch.float32]
        chunk, total = per_block * _BLOCK, sum(sizes)
        while chunk < _LARGEST_CHUNK and total > chunk * _ENOUGH_PROGRAMS:
            chunk *= 2
        table, results = (
            self._table(stream, addresses, sizes, chunk, dtype.itemsize)
            for addresses in (sources, targets)
        )
        programs = len(table) // COLUMNS
        end = first + programs * (chunk // per_block) * draws
        if end > _COUNTERS:
            raise RuntimeError(
                f"One key has {_COUNTERS} blocks, but these tensors need {end}. Pass fewer tensors at a time."
            )
        bits = struct.unpack("<6q", scaling + key)
        arguments = (
            table, results, chunk, first, *bits, _ONE, draws, _TYPES[dtype], per_block, _BLOCK,
        )  # fmt: skip
        compiled = self._compiled.get((dtype, draws))
        if compiled is None:
            launched = kernels.add_gaussian[(programs,)](*arguments)
            self._compiled[dtype, draws] = launched  # None in Triton's interpreter
        else:
            compiled[(programs, 1, 1)](*arguments)
        return end

    def blocks(self, key: bytes, nonce: bytes, first: int) -> bytes:
        """Return the keystream of ``_BLOCK`` blocks as the device computes it."""
        out = torch.zeros(_BLOCK, 16, dtype=torch.int32, device=self._device)
        with self._on_device():
            kernels.store_blocks[(1,)](
                out, *_words(first.to_bytes(4, "little") + key + nonce), _ONE, BLOCK=_BLOCK
            )
        return out.cpu().numpy().tobytes()

    def pairs(self, words: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Return pairs of float32 values that the device makes from words; both are ``[_BLOCK, 2]``."""
        given = torch.from_numpy(words.view(np.int32)).to(self._device)
        out = torch.zeros(_BLOCK, 2, device=self._device)
        with self._on_device():
            kernels.store_pairs[(1,)](given, out, BLOCK=_BLOCK)
        found: NDArray[np.float32] = out.cpu().numpy()
        return found

    def self_test(self) -> None:
        """Raise RuntimeError unless the device agrees with RFC 8439 and with the CPU."""
        selftest.verify(self, self._device)


def _words(octets: bytes) -> tuple[int, ...]:
    """Return the words as int32, so that the kernel's types never depend on the values."""
    return struct.unpack(f"<{len(octets) // 4}i", octets)
