"""Noise made on the CPU: keystream, Gaussians, addition, piece by piece in cache-sized memory."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from clipgrad.noise import _checks as checks
from clipgrad.noise._box_muller import BoxMuller
from clipgrad.noise._fused import fused
from clipgrad.noise._keys import Lineage
from clipgrad.noise._keystream import KEY_BYTES, Bits, Keystream
from clipgrad.noise._pieces import pieces

# Of more values than this torch shares an addition out over its threads; so few stay in this one.
PIECE = 2**15
# What torch's threads work on together: large enough to be worth sharing, small enough for their caches.
SHARED_PIECE = 2**17
# A compiled loop makes whole pieces. Few of this size take less time than one that is shared, most of it thrown away;
# and for a small part of such a piece it does not pay.
SMALL_PIECE, FEW, SMALL_PART = 2**14, 3, 1 / 8
_CPU = torch.device("cpu")
_PID_AT_IMPORT = os.getpid()


class Gaussians(Protocol):
    """What makes independent values of N(0, 1) of bits."""

    capacity: int

    def draw(self, keystream: Bits, size: int) -> Tensor:
        """At most ``capacity`` values."""
        ...


class CpuNoise:
    """What makes noise on the CPU of one process. For one call at a time.

    Large calls run on torch's own threads, which are awake anyway after a backward pass. Threads of Python's
    took longer than one alone: they hand the interpreter's lock to and fro, and torch's keep spinning beside them.

    Args:
        lineage: Hands out the keys.
        draws: Independent values of which each value of the noise is the scaled sum.
        compiled: Whether float32 is made by a compiled loop, if there is a compiler.
    """

    def __init__(self, lineage: Lineage, draws: int, *, compiled: bool = False) -> None:
        self._lineage, self._draws, self._compiled = lineage, draws, compiled
        self._scratch: dict[tuple[torch.dtype, bool], BoxMuller] = {}
        self._fused: dict[tuple[int, bool], Gaussians | None] = {}
        self._sums: dict[tuple[torch.dtype, int], Tensor] = {}

    def add(self, flats: list[Tensor], sigma: float) -> None:
        """Add to flat tensors in the CPU's memory, all drawn in one dtype."""
        dtype = checks.DRAWN_IN[flats[0].dtype]
        keystream = Keystream(partial(self._lineage.key, _CPU, KEY_BYTES))
        scale = sigma / math.sqrt(self._draws)
        for large in pieces(flats, SHARED_PIECE):
            gaussians = self._gaussians(dtype, sum(part.numel() for part in large))
            for piece in pieces(large, gaussians.capacity):
                sizes = [part.numel() for part in piece]
                noise = self._draw(gaussians, keystream, sum(sizes))
                if len(piece) == 1:
                    piece[0].add_(noise, alpha=scale)
                else:
                    torch._foreach_add_(piece, noise.split(sizes), alpha=scale)

    def _gaussians(self, dtype: torch.dtype, size: int) -> Gaussians:
        """What makes so many values fastest."""
        # In a forked child torch's threads do not exist and never answer, and a compiler starts threads itself.
        forked = self._lineage.process[0] != _PID_AT_IMPORT
        threads = not forked and torch.get_num_threads() > 1
        enough = size >= SMALL_PART * SMALL_PIECE
        if self._compiled and dtype is torch.float32 and enough and not forked:
            few = size <= FEW * SMALL_PIECE
            at = (SMALL_PIECE, False) if few else (SHARED_PIECE, threads)
            if at not in self._fused:
                self._fused[at] = fused(at[0], parallel=at[1])
            if (found := self._fused[at]) is not None:
                return found
        shared = threads and size > PIECE
        if (dtype, shared) not in self._scratch:
            limit = SHARED_PIECE if shared else PIECE
            self._scratch[dtype, shared] = BoxMuller(dtype, limit, shared=shared)
        return self._scratch[dtype, shared]

    def _draw(self, gaussians: Gaussians, keystream: Keystream, size: int) -> Tensor:
        """A value of variance ``draws`` for each of the ``size``."""
        values = gaussians.draw(keystream, size)
        if self._draws == 1:
            return values
        at = (values.dtype, gaussians.capacity)
        if at not in self._sums:
            with torch.inference_mode(False):
                self._sums[at] = torch.empty(gaussians.capacity, dtype=values.dtype)
        total = self._sums[at][:size].copy_(values)
        for _ in range(self._draws - 1):
            total.add_(gaussians.draw(keystream, size))
        return total
