"""Make noise on the CPU piece by piece in cache-sized memory: keystream, Gaussians, addition."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch
from torch import Tensor

from clipgrad.noise import checks
from clipgrad.noise.box_muller import BoxMuller
from clipgrad.noise.c_loop import LoopedBoxMuller, make_looped
from clipgrad.noise.keys import KeyDeriver
from clipgrad.noise.keystream import KEY_BYTES, Keystream
from clipgrad.noise.pieces import pieces

# torch runs an addition of more values than this on several threads; a piece of this size stays on the calling thread.
PIECE = 2**15
# A piece that torch's threads share: large enough to be worth it, small enough for their caches.
SHARED_PIECE = 2**17
# Smaller tensors are concatenated: the operations for each tensor would cost more than its values.
_ALONE = 2**11
# Calls of at least this many values run on Python threads, since the cipher and the loop release the GIL. For fewer
# values threads do not pay: after a backward pass PyTorch's threads keep spinning for milliseconds.
_MANY, _MOST_THREADS = 2**22, 16
_CPU = torch.device("cpu")
_PID_AT_IMPORT = os.getpid()
Gaussians = BoxMuller | LoopedBoxMuller


class CpuNoise:
    """Make noise on the CPU of one process. Only one call may run at a time.

    Without the C loop, large calls run on torch's own threads, which are awake after a backward pass. Python threads
    took longer than a single thread: they contend for the GIL while torch's threads keep spinning.
    Each value is the scaled sum of ``draws`` Gaussians. ``compiled`` allows the C loop, if there is a compiler.
    """

    def __init__(self, key_deriver: KeyDeriver, draws: int, *, compiled: bool = True) -> None:
        self._key_deriver, self._draws, self._compiled = key_deriver, draws, compiled
        self._gaussians: dict[tuple[torch.dtype, bool], Gaussians] = {}
        self._sums: dict[tuple[torch.dtype, int], Tensor] = {}
        self._loops: list[LoopedBoxMuller] = []
        self._pool: ThreadPoolExecutor | None = None

    def add(self, flats: list[Tensor], sigma: float, divisor: float = 1.0) -> None:
        """Add noise to flat CPU tensors and divide the sums. The noise of all tensors must have one dtype."""
        dtype = checks.NOISE_DTYPE[flats[0].dtype]
        keystream = self._keystream()
        scale = sigma / math.sqrt(self._draws)
        gaussians = self._gaussians_for(dtype, sum(map(Tensor.numel, flats)))
        together = flats
        if isinstance(gaussians, LoopedBoxMuller) and self._draws == 1:
            together = []
            small: list[Tensor] = []
            large: list[Tensor] = []
            for flat in flats:
                if flat.dtype is not torch.float32:
                    together.append(flat)
                else:
                    (small if flat.numel() < _ALONE else large).append(flat)
            if sum(map(Tensor.numel, large)) < _MANY:
                _add_to_each(gaussians, keystream, large, scale, divisor)
            else:
                self._add_in_threads(large, scale, divisor)
            for piece in pieces(small, gaussians.capacity):
                joined = piece[0] if len(piece) == 1 else torch.cat(piece)
                gaussians.add(keystream, joined, scale, divisor)
                if joined is not piece[0]:
                    torch._foreach_copy_(piece, joined.split(list(map(Tensor.numel, piece))))
        for piece in pieces(together, gaussians.capacity):
            sizes = [part.numel() for part in piece]
            noise = self._draw(gaussians, keystream, sum(sizes))
            torch._foreach_add_(piece, noise.split(sizes), alpha=scale)
            if divisor != 1.0:
                torch._foreach_div_(piece, divisor)

    def in_turns(
        self, counts: Sequence[int], sigma: float, use: Callable[[int, Tensor], None]
    ) -> None:
        """Make float32 noise in memory that stays in the cache, and hand it over piece by piece.

        Args:
            counts: How many values each turn needs.
            sigma: Standard deviation.
            use: Called with the number of a turn and a tensor, which begins with its values. Several threads may call
                it at once, each with memory of its own.
        """
        gaussians = self._gaussians_for(torch.float32, sum(counts))
        if not isinstance(gaussians, LoopedBoxMuller) or self._draws > 1:
            values = torch.empty(max(counts, default=0), dtype=torch.float32, device="cpu")
            for turn, count in enumerate(counts):
                self.add([values[:count].zero_()], sigma)
                use(turn, values)
            return
        every = range(len(counts))
        if sum(counts) < _MANY:
            _hand_over(gaussians, self._keystream(), every, counts, sigma, use)
            return
        share = math.ceil(len(counts) / min(torch.get_num_threads(), _MOST_THREADS))
        shares = [every[start : start + share] for start in every[::share]]
        self._in_threads(_hand_over, shares, counts, sigma, use)

    def _keystream(self) -> Keystream:
        return Keystream(partial(self._key_deriver.key, _CPU, KEY_BYTES))

    def _add_in_threads(self, flats: list[Tensor], scale: float, divisor: float) -> None:
        """Add noise to large tensors in threads, each with its share of all values."""
        count = min(torch.get_num_threads(), _MOST_THREADS)
        shares = pieces(flats, math.ceil(sum(map(Tensor.numel, flats)) / count))
        self._in_threads(_add_to_each, list(shares), scale, divisor)

    def _in_threads(
        self,
        work: Callable[..., None],
        shares: Sequence[list[Tensor]] | Sequence[range],
        *args: object,
    ) -> None:
        """Do the work of each share in a thread, with a loop and a key of its own."""
        while len(self._loops) < len(shares):
            another = make_looped(may_compile=False)
            assert another is not None, "the loop was compiled before"
            self._loops.append(another)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_MOST_THREADS, "clipgrad-noise")
        waiting: list[Future[None]] = []
        try:
            for loop, share in zip(self._loops[1:], shares[1:], strict=False):
                stream = self._keystream()
                waiting.append(self._pool.submit(work, loop, stream, share, *args))
            work(self._loops[0], self._keystream(), shares[0], *args)
        finally:  # the caller must not read a tensor that a thread still writes to
            wait(waiting)
        for future in waiting:
            future.result()

    def _gaussians_for(self, dtype: torch.dtype, size: int) -> Gaussians:
        """Return the object that makes ``size`` values fastest."""
        # In a forked child torch's threads do not exist, so an operation that waits for them hangs.
        forked = self._key_deriver.process[0] != _PID_AT_IMPORT
        shared = not forked and torch.get_num_threads() > 1 and size > PIECE
        found = self._gaussians.get((dtype, shared))
        if found is None:
            if self._compiled and dtype is torch.float32:
                found = make_looped(may_compile=not forked)
            if found is None:
                found = BoxMuller(dtype, SHARED_PIECE if shared else PIECE, shared=shared)
            self._gaussians[dtype, shared] = found
        return found

    def _draw(self, gaussians: Gaussians, keystream: Keystream, size: int) -> Tensor:
        """Return ``size`` values, each the sum of ``draws`` values of N(0, 1)."""
        values = gaussians.draw(keystream, size)
        if self._draws == 1:
            return values
        at = (values.dtype, gaussians.capacity)
        if at not in self._sums:
            with torch.inference_mode(False):
                self._sums[at] = torch.empty(gaussians.capacity, dtype=values.dtype, device="cpu")
        total = self._sums[at][:size].copy_(values)
        for _ in range(self._draws - 1):
            total.add_(gaussians.draw(keystream, size))
        return total


def _add_to_each(
    loop: LoopedBoxMuller, keystream: Keystream, flats: list[Tensor], scale: float, divisor: float
) -> None:
    for flat in flats:
        loop.add(keystream, flat, scale, divisor)


def _hand_over(
    loop: LoopedBoxMuller,
    keystream: Keystream,
    turns: range,
    counts: Sequence[int],
    sigma: float,
    use: Callable[[int, Tensor], None],
) -> None:
    values = torch.empty(max(counts, default=0), dtype=torch.float32, device="cpu")
    for turn in turns:
        loop.fill(keystream, values, counts[turn], sigma)
        use(turn, values)
