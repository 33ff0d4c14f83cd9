"""Noise made on the CPU: keystream, Gaussians, addition, piece by piece in cache-sized memory."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from clipgrad.noise import _checks as checks
from clipgrad.noise._box_muller import BoxMuller
from clipgrad.noise._keys import Lineage
from clipgrad.noise._keystream import Keystream
from clipgrad.noise._pieces import pieces, share_out

# Tensor.add_ on more values than this starts an OpenMP team in each thread that calls it.
PIECE = 2**15
_PIECES_PER_WORKER = 4  # 0.3 ms of drawing: no thread is worth waking for less
_MOST_WORKERS = 4  # on 16 cores eight took longer: they wait for the interpreter's lock
# A key is made in 17 us, in which 7000 values are drawn, so small calls go on where the last one stopped.
_BYTES_PER_KEY = 2**20
_CPU = torch.device("cpu")
_PID_AT_IMPORT = os.getpid()


class CpuNoise:
    """The workers of one process and the threads that they run in. For one call at a time.

    Args:
        lineage: Hands out the keys.
        draws: Independent values of which each value of the noise is the scaled sum.
    """

    def __init__(self, lineage: Lineage, draws: int) -> None:
        self._lineage, self._draws = lineage, draws
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(_MOST_WORKERS)

    def add(self, flats: list[Tensor], sigma: float) -> None:
        """Add to flat tensors in the CPU's memory, all drawn in one dtype."""
        parts = list(pieces(flats, PIECE))
        # PyTorch's threading does not survive a fork: "Invalid thread pool!", now and then.
        threads = torch.get_num_threads() if self._lineage.process[0] == _PID_AT_IMPORT else 1
        count = max(1, min(threads, _MOST_WORKERS, len(parts) // _PIECES_PER_WORKER))
        while len(self._workers) < count:
            self._workers.append(_Worker(self._lineage, len(self._workers), self._draws))
        workers = self._workers[:count]
        for worker in workers:
            worker.begin()
        if count == 1:
            for part in parts:
                workers[0].add(part, sigma)
        else:
            share_out(
                parts, [partial(worker.add, sigma=sigma) for worker in workers], self._threads
            )


class _Worker:
    """One keystream at a time and scratch memory, used by one thread at a time."""

    def __init__(self, lineage: Lineage, index: int, draws: int) -> None:
        self._lineage, self._index, self._draws = lineage, index, draws
        self._keystream: Keystream | None = None
        self._scratch: dict[torch.dtype, BoxMuller] = {}
        self._sums: dict[torch.dtype, Tensor] = {}

    def begin(self) -> None:
        """Take a new key, unless the one at hand has given little."""
        if self._keystream is None or self._keystream.given > _BYTES_PER_KEY:
            self._keystream = Keystream(self._lineage.key(_CPU, self._index))

    def add(self, piece: list[Tensor], sigma: float) -> None:
        sizes = [part.numel() for part in piece]
        noise = self._draw(sum(sizes), checks.DRAWN_IN[piece[0].dtype])
        scale = sigma / math.sqrt(self._draws)
        if len(piece) == 1:
            piece[0].add_(noise, alpha=scale)
        else:
            torch._foreach_add_(piece, noise.split(sizes), alpha=scale)

    def _draw(self, size: int, dtype: torch.dtype) -> Tensor:
        """A value of variance ``draws`` for each of the ``size``."""
        assert self._keystream is not None
        if dtype not in self._scratch:
            self._scratch[dtype] = BoxMuller(dtype, PIECE)
        gaussians = self._scratch[dtype]
        values = gaussians.draw(self._keystream, size)
        if self._draws == 1:
            return values
        if dtype not in self._sums:
            with torch.inference_mode(False):
                self._sums[dtype] = torch.empty(PIECE, dtype=dtype)
        total = self._sums[dtype][:size].copy_(values)
        for _ in range(self._draws - 1):
            total.add_(gaussians.draw(self._keystream, size))
        return total
