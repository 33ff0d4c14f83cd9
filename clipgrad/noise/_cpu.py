"""Noise made on the CPU: keystream, Gaussians, addition, piece by piece in cache-sized memory."""

from __future__ import annotations

import math
import os
from functools import partial

import torch
from torch import Tensor

from clipgrad.noise import _checks as checks
from clipgrad.noise._box_muller import BoxMuller
from clipgrad.noise._keys import Lineage
from clipgrad.noise._keystream import KEY_BYTES, Keystream
from clipgrad.noise._pieces import pieces

# Of more values than this torch shares an addition out over its threads; so few stay in this one.
PIECE = 2**15
# What torch's threads work on together: large enough to be worth sharing, small enough for their caches.
SHARED_PIECE = 2**17
_CPU = torch.device("cpu")
_PID_AT_IMPORT = os.getpid()


class CpuNoise:
    """What makes noise on the CPU of one process. For one call at a time.

    Large calls run on torch's own threads, which are awake anyway after a backward pass. Threads of Python's
    took longer than one alone: they hand the interpreter's lock to and fro, and torch's keep spinning beside them.

    Args:
        lineage: Hands out the keys.
        draws: Independent values of which each value of the noise is the scaled sum.
    """

    def __init__(self, lineage: Lineage, draws: int) -> None:
        self._lineage, self._draws = lineage, draws
        self._scratch: dict[tuple[torch.dtype, bool], BoxMuller] = {}
        self._sums: dict[tuple[torch.dtype, int], Tensor] = {}

    def add(self, flats: list[Tensor], sigma: float) -> None:
        """Add to flat tensors in the CPU's memory, all drawn in one dtype."""
        dtype = checks.DRAWN_IN[flats[0].dtype]
        shared = self._shared(sum(flat.numel() for flat in flats))
        limit = SHARED_PIECE if shared else PIECE
        if (dtype, shared) not in self._scratch:
            self._scratch[dtype, shared] = BoxMuller(dtype, limit, shared=shared)
        gaussians = self._scratch[dtype, shared]
        keystream = Keystream(partial(self._lineage.key, _CPU, KEY_BYTES))
        scale = sigma / math.sqrt(self._draws)
        for piece in pieces(flats, limit):
            sizes = [part.numel() for part in piece]
            noise = self._draw(gaussians, keystream, sum(sizes))
            if len(piece) == 1:
                piece[0].add_(noise, alpha=scale)
            else:
                torch._foreach_add_(piece, noise.split(sizes), alpha=scale)

    def _shared(self, size: int) -> bool:
        """Whether torch's threads share the work; in a forked child they do not exist and never answer."""
        alone = torch.get_num_threads() == 1 or self._lineage.process[0] != _PID_AT_IMPORT
        return size > PIECE and not alone

    def _draw(self, gaussians: BoxMuller, keystream: Keystream, size: int) -> Tensor:
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
