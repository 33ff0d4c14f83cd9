"""Gaussians by one compiled loop that proved itself, if there is a compiler."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
import torch._inductor
from torch import Tensor

from clipgrad.noise._box_muller import BoxMuller
from clipgrad.noise._float32_loop import gaussians
from clipgrad.noise._keystream import SLACK, Bits

Loop = Callable[[Tensor, Tensor, Tensor, Tensor], object]

_RADIUS_BYTES, _PAIR_BYTES = 8, 12
_SECONDS_TO_TELL = 5.0
_TOLERANCE = 1e-6  # relative; rounding makes 4e-7
# A product and a sum in one instruction: 0.54 beside 0.82 ns a value.
_CONTRACT: dict[str, object] = {"cpp.enable_floating_point_contract_flag": "fast"}
_ALONE = {**_CONTRACT, "cpp.threads": 1}
_SHARED = {**_CONTRACT, "cpp.dynamic_threads": True}  # as many as torch has at the call
_log = logging.getLogger("clipgrad")
_proved: dict[tuple[int, bool], Loop | None] = {}
_told = False
_compiling = threading.Lock()


class FusedBoxMuller:
    """Gaussians of float32 in memory of its own, cache-sized and used by one thread at a time.

    Args:
        capacity: The most values asked for at a time, an even number.
        loop: Compiled for half as many pairs.

    Attributes:
        capacity: As above.
    """

    def __init__(self, capacity: int, loop: Loop) -> None:
        self.capacity, self._loop = capacity, loop
        pairs = capacity // 2
        radii = _RADIUS_BYTES * pairs
        memory = bytearray(_PAIR_BYTES * pairs + SLACK)
        self._bits = memoryview(memory)
        self._zeros = memoryview(bytes(_PAIR_BYTES * pairs))
        with torch.inference_mode(False):  # else unusable outside of that mode
            words = torch.frombuffer(memory, dtype=torch.uint8)
            self._j = words[:radii].view(torch.int64)
            self._k = words[radii : _PAIR_BYTES * pairs].view(torch.int32)
            self._values = torch.full((capacity,), float("nan"), dtype=torch.float32, device="cpu")
            self._sines, self._cosines = self._values.view(2, pairs)

    def draw(self, keystream: Bits, size: int) -> Tensor:
        """``size`` values of N(0, 1), one dimension, valid until the next call.

        The loop is compiled for ``capacity`` values, so that many are made; those left over are thrown away.
        """
        keystream.fill(self._bits, self._zeros)
        self._loop(self._j, self._k, self._sines, self._cosines)
        return self._values[:size]


def fused(capacity: int, *, parallel: bool) -> FusedBoxMuller | None:
    """What draws by a compiled loop; None, and a warning, if there is no compiler or the loop is wrong.

    Not for forked children: OpenMP's threads do not exist there, and compilers start some.

    Args:
        capacity: As :class:`FusedBoxMuller`'s.
        parallel: Whether torch's threads share the loop.
    """
    with _compiling, torch.inference_mode(False), torch.no_grad():
        if (capacity, parallel) not in _proved:
            _proved[capacity, parallel] = _compile_and_prove(capacity, parallel)
        loop = _proved[capacity, parallel]
    return None if loop is None else FusedBoxMuller(capacity, loop)


def _compile_and_prove(capacity: int, parallel: bool) -> Loop | None:
    try:
        started = time.perf_counter()
        loop = compiled(capacity, parallel)
        prove(FusedBoxMuller(capacity, loop))
        seconds = time.perf_counter() - started
    except Exception as error:  # a compiler may fail in any way; the noise is as private without
        _tell(error)
        return None
    if seconds > _SECONDS_TO_TELL:
        _log.warning("clipgrad: compiled noise on the CPU in %.1f s.", seconds)
    return loop


def compiled(capacity: int, parallel: bool) -> Loop:
    """The loop of :mod:`clipgrad.noise._float32_loop` for half as many pairs as ``capacity``.

    By ``torch._inductor.standalone_compile``, not ``torch.compile``: that would watch frames of Python's, with limits
    and caches that belong to the user, and ask 40 microseconds of questions at each call instead of 10.
    """
    pairs = capacity // 2
    dtypes = (torch.int64, torch.int32, torch.float32, torch.float32)
    example: list[Any] = [torch.zeros(pairs, dtype=dtype, device="cpu") for dtype in dtypes]
    loop: Loop = torch._inductor.standalone_compile(
        torch.fx.symbolic_trace(gaussians),
        example,
        dynamic_shapes="from_example_inputs",
        options={"config_patches": _SHARED if parallel else _ALONE},
    )
    loop(*example)  # compilers fail here, or above
    return loop


def prove(found: FusedBoxMuller) -> None:
    """Compare with :class:`BoxMuller` on public bits, random ones and those at every edge.

    Raises:
        RuntimeError: If a value differs by more than rounding.
    """
    bits = _Public(found.capacity // 2)
    values = found.draw(bits, found.capacity).double()
    expected = BoxMuller(torch.float32, found.capacity).draw(bits, found.capacity).double()
    wrong = ~((values - expected).abs() <= _TOLERANCE * expected.abs())  # NaN is wrong too
    if wrong.any():
        at = int(wrong.int().argmax())
        raise RuntimeError(
            f"the compiled transform computes {float(values[at])} where {float(expected[at])} is right"
        )


class _Public:
    """Bits that are no secret, and none of a cipher's."""

    def __init__(self, pairs: int) -> None:
        memory = bytearray(hashlib.shake_128(b"clipgrad.noise").digest(_PAIR_BYTES * pairs))
        few = range(0, 31, 10)
        edges = [
            *product(_edges(64, range(63)), _edges(32, few)),
            *product(_edges(64, few), _edges(32, range(31))),
        ][:pairs]
        j, k = zip(*edges, strict=True)
        np.frombuffer(memory, "<i8", pairs)[: len(edges)] = j
        np.frombuffer(memory, "<i4", pairs, _RADIUS_BYTES * pairs)[: len(edges)] = k
        self._bytes = memory

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        buffer[: len(zeros)] = self._bytes


def _edges(bits: int, powers: range) -> list[int]:
    """0, the ends, and what lies a power of two from either, of both signs."""
    top = 2 ** (bits - 1)
    near = {0, top - 1} | {2**k for k in powers} | {top - 2**k for k in powers}
    return sorted(near | {-1 - word for word in near})


def _tell(error: Exception) -> None:
    global _told
    if _told:
        return
    _told = True
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    _log.warning(
        "Noise on the CPU is made uncompiled, which is as private and slower: %s (%s). TorchInductor needs a C++ "
        "compiler.",
        reason,
        type(error).__name__,
    )
