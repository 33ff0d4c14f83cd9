"""ChaCha20 noise on a CUDA device: launches the kernels, and has them prove themselves. Needs Triton."""

from __future__ import annotations

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from clipgrad.kernels import chacha_kernels as kernels
from clipgrad.kernels import chacha_proof as proof

_BLOCK = proof.LANES
_LARGEST_CHUNK = 2**16
_ENOUGH_PROGRAMS = 2**13
_COUNTERS = 2**32  # RFC 8439 counts blocks in 32 bits
_ONE = 1  # the kernel must not know
_MOST_TABLES = 8
_COLUMNS = 3  # of a table
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class TritonChaCha:
    """Adds noise on one device; a launch for each dtype, however many tensors there are.

    A launch reads from a table where the tensors lie. Tables stay on the device, and one is used again for the very
    addresses and sizes that it holds: the sums of a training tend to lie where those of the last step did. So does the
    compiled kernel, whose launch takes Triton a fraction of the time that finding it does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A table belongs to the stream it was made on, so that its memory is not given to others while one reads it.
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self._compiled: dict[tuple[torch.dtype, int], Any] = {}

    def limit(self, draws: int) -> int:
        """The most values that one key is good for; a quarter of its blocks, room for what is unused."""
        return _COUNTERS // 4 * min(proof.PER_BLOCK.values()) // draws

    def add_gaussian_(
        self,
        tensors: list[Tensor],
        sigma: float,
        draws: int,
        key: bytes,
        divisor: float = 1.0,
        into: list[Tensor] | None = None,
    ) -> None:
        """Add ``N(0, sigma^2)`` to tensors of the device and divide the sums.

        Args:
            tensors: Of any shape, without gaps in their memory: contiguous, but for the order of their axes.
            sigma: Standard deviation, positive.
            draws: Independent values of which each value is the scaled sum.
            key: 32 bytes that are used for nothing else.
            divisor: The sums are multiplied by its rounded inverse, as CUDA's division by a number is done.
            into: Tensors alike, which get the results; none lies across another of these or of ``tensors``. None: in
                place.

        Raises:
            RuntimeError: If the key has too few blocks, or if a CUDA graph is being captured; nothing is written to
                the tensors that are left.
        """
        both = zip(tensors, tensors if into is None else into, strict=True)
        filled = [pair for pair in both if pair[0].numel()]
        # The kernel is told addresses and the sizes of the sources.
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
        """Add to tensors of one dtype from block ``first`` on; the first block that is left."""
        _, dtype, sources, targets, sizes = where
        per_block = proof.PER_BLOCK[torch.float64 if dtype is torch.float64 else torch.float32]
        chunk, total = per_block * _BLOCK, sum(sizes)
        while chunk < _LARGEST_CHUNK and total > chunk * _ENOUGH_PROGRAMS:
            chunk *= 2
        table = self._tables.get(where)
        if table is None:
            table = self._copied(_table((sources, targets), sizes, chunk, dtype.itemsize))
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            self._tables[where] = table
        programs = len(table) // _COLUMNS
        end = first + programs * (chunk // per_block) * draws
        if end > _COUNTERS:
            raise RuntimeError(
                f"one key has {_COUNTERS} blocks, and {end} were asked for; pass fewer tensors at a time."
            )
        bits = struct.unpack("<6q", scaling + key)
        arguments = (table, chunk, first, *bits, _ONE, draws, _TYPES[dtype], per_block, _BLOCK)
        compiled = self._compiled.get((dtype, draws))
        if compiled is None:
            launched = kernels.add_gaussian[(programs,)](*arguments)
            self._compiled[dtype, draws] = launched  # None in Triton's interpreter
        else:
            compiled[(programs, 1, 1)](*arguments)
        return end

    def _copied(self, table: NDArray[np.int64]) -> Tensor:
        """The table on the device. A copy from pageable memory would wait for all that the device has to do."""
        on_cpu = torch.from_numpy(table)
        if self._device.type != "cuda":
            return on_cpu
        return on_cpu.pin_memory().to(self._device, non_blocking=True)

    def _stream(self) -> int:
        """The current stream; an error if it is being captured, for each replay would add the same noise."""
        if self._device.type != "cuda":
            return 0
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "noise was asked for while a CUDA graph is captured, and each replay of the graph would add the same "
                "noise again; add noise outside of the graph."
            )
        return int(torch.cuda.current_stream().cuda_stream)

    def _on_device(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            return nullcontext()
        return torch.cuda.device(self._device)

    # ------------------------------------------------------------------ proof

    def blocks(self, key: bytes, nonce: bytes, first: int) -> bytes:
        """The keystream of ``_BLOCK`` blocks as the device computes it."""
        out = torch.zeros(_BLOCK, 16, dtype=torch.int32, device=self._device)
        with self._on_device():
            kernels.store_blocks[(1,)](
                out, *_words(first.to_bytes(4, "little") + key + nonce), _ONE, BLOCK=_BLOCK
            )
        return out.cpu().numpy().tobytes()

    def pairs(self, words: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Pairs of float32 values as the device makes them of words, ``[_BLOCK, 2]`` both."""
        given = torch.from_numpy(words.view(np.int32)).to(self._device)
        out = torch.zeros(_BLOCK, 2, device=self._device)
        with self._on_device():
            kernels.store_pairs[(1,)](given, out, BLOCK=_BLOCK)
        found: NDArray[np.float32] = out.cpu().numpy()
        return found

    def prove(self) -> None:
        """Compare the device with RFC 8439 and with the CPU.

        Raises:
            RuntimeError: If it computes anything else.
        """
        proof.prove(self, self._device)


def _table(
    addresses: tuple[tuple[int, ...], tuple[int, ...]],
    sizes: tuple[int, ...],
    chunk: int,
    itemsize: int,
) -> NDArray[np.int64]:
    """What the kernel reads: for each program where its values lie, where they go, and how many they are."""
    size = np.array(sizes, dtype=np.int64)
    programs = -(-size // chunk)
    within = np.arange(programs.sum()) - np.repeat(programs.cumsum() - programs, programs)
    table = np.empty((len(within), _COLUMNS), dtype=np.int64)
    for column, starts in enumerate(addresses):
        known = np.array(starts, dtype=np.uint64).view(np.int64)
        table[:, column] = np.repeat(known, programs) + within * chunk * itemsize
    table[:, -1] = np.minimum(np.repeat(size, programs) - within * chunk, chunk)
    return table.reshape(-1)


def _words(octets: bytes) -> tuple[int, ...]:
    """As int32, so that the kernel's types never depend on the values."""
    return struct.unpack(f"<{len(octets) // 4}i", octets)
