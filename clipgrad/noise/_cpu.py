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
from clipgrad.noise._c_loop import looped
from clipgrad.noise._keys import Lineage
from clipgrad.noise._keystream import KEY_BYTES, Bits, Keystream
from clipgrad.noise._pieces import pieces

# Of more values than this torch shares an addition out over its threads; so few stay in this one.
PIECE = 2**15
# What torch's threads work on together: large enough to be worth sharing, small enough for their caches.
SHARED_PIECE = 2**17
_CPU = torch.device("cpu")
_PID_AT_IMPORT = os.getpid()


class Gaussians(Protocol):
    """What makes independent values of N(0, 1) of bits."""

    capacity: int

    def draw(self, keystream: Bits, size: int) -> Tensor:
        """At most ``capacity`` values."""
        ...

    def add(self, keystream: Bits, target: Tensor, scale: float) -> None:
        """Add ``scale`` times such a value to each of at most ``capacity`` values."""
        ...


class CpuNoise:
    """What makes noise on the CPU of one process. For one call at a time.

    Uncompiled, large calls run on torch's own threads, which are awake anyway after a backward pass. Python's threads
    took longer than one alone: they hand the interpreter's lock to and fro, and torch's keep spinning beside them.

    Args:
        lineage: Hands out the keys.
        draws: Independent values of which each value of the noise is the scaled sum.
        compiled: Whether float32 is made by a loop in C, if there is a compiler.
    """

    def __init__(self, lineage: Lineage, draws: int, *, compiled: bool = True) -> None:
        self._lineage, self._draws, self._compiled = lineage, draws, compiled
        self._gaussians: dict[tuple[torch.dtype, bool], Gaussians] = {}
        self._sums: dict[tuple[torch.dtype, int], Tensor] = {}

    def add(self, flats: list[Tensor], sigma: float) -> None:
        """Add to flat tensors in the CPU's memory, all drawn in one dtype."""
        dtype = checks.DRAWN_IN[flats[0].dtype]
        keystream = Keystream(partial(self._lineage.key, _CPU, KEY_BYTES))
        scale = sigma / math.sqrt(self._draws)
        gaussians = self._for(dtype, sum(map(Tensor.numel, flats)))
        for piece in pieces(flats, gaussians.capacity):
            if len(piece) == 1 and self._draws == 1:
                gaussians.add(keystream, piece[0], scale)
                continue
            sizes = [part.numel() for part in piece]
            noise = self._draw(gaussians, keystream, sum(sizes))
            torch._foreach_add_(piece, noise.split(sizes), alpha=scale)

    def _for(self, dtype: torch.dtype, size: int) -> Gaussians:
        """What makes so many values fastest."""
        # In a forked child torch's threads do not exist and never answer.
        forked = self._lineage.process[0] != _PID_AT_IMPORT
        shared = not forked and torch.get_num_threads() > 1 and size > PIECE
        found = self._gaussians.get((dtype, shared))
        if found is None:
            if self._compiled and dtype is torch.float32:
                found = looped()
            if found is None:
                found = BoxMuller(dtype, SHARED_PIECE if shared else PIECE, shared=shared)
            self._gaussians[dtype, shared] = found
        return found

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
