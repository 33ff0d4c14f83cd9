"""Gaussians of float32 by one loop in C that proved itself, if there is a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipgrad.noise.box_muller import BoxMuller
from clipgrad.noise.keystream import SLACK, Bits

Loop = Callable[[int, int, int, float, float, int], object]
"""``(j, k, size, scale, divisor, target)`` with the addresses of three arrays; see ``float32_loop.c``."""

# A piece, its bits and the zeros that become them, 512 KiB, stay in the cache of one core.
CAPACITY = 2**15
SOURCE = Path(__file__).with_name("float32_loop.c")
_COMPILERS = ("cc", "gcc", "clang")
# The sum of a product is rounded once; no function sets errno, no operation traps: else nothing is vectorised.
_FLAGS = (
    "-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
_SECONDS = 60
_BYTES = 4  # of a float32
_RADIUS_BYTES, _PAIR_BYTES = 8, 12
_TOLERANCE = 1e-6  # relative; rounding makes 4e-7
_log = logging.getLogger("clipgrad")
_found: list[Loop | None] = []
_compiling = threading.Lock()


def _forked() -> None:
    """A thread of the parent's may have held the lock, and is not there to let go of it."""
    global _compiling
    _compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class LoopedBoxMuller:
    """Gaussians of float32 in memory of its own, used by one thread at a time.

    Args:
        loop: What :func:`compiled` returned.

    Attributes:
        capacity: The most values asked for at a time.
    """

    capacity = CAPACITY

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        memory = bytearray(_PAIR_BYTES * CAPACITY // 2 + SLACK)
        self._bits, self._zeros = memoryview(memory), memoryview(bytes(len(memory) - SLACK))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with torch.inference_mode(False):  # else unusable outside of that mode
            self._values = torch.empty(CAPACITY, dtype=torch.float32, device="cpu")

    def draw(self, keystream: Bits, size: int) -> Tensor:
        """``size`` values of N(0, 1), one dimension, valid until the next call."""
        values = self._values[:size].zero_()
        self._add(keystream, size, 1.0, 1.0, values.data_ptr())
        return values

    def add(self, keystream: Bits, target: Tensor, scale: float, divisor: float = 1.0) -> None:
        """Add ``scale * N(0, 1)`` to each value of a contiguous float32 tensor of any size, and divide the sum.

        By address only, so that any thread may: tensor operations ask whether gradients are recorded, which each thread
        says for itself.
        """
        assert target.dtype is torch.float32, "the loop knows no other"
        size, address = target.numel(), target.data_ptr()
        for start in range(0, size, CAPACITY):
            some = min(CAPACITY, size - start)
            self._add(keystream, some, scale, divisor, address + _BYTES * start)
        if not target.is_inference():
            # Autograd, and whoever else watches versions, does not see who writes by address.
            torch.autograd.graph.increment_version(target)

    def _add(self, keystream: Bits, size: int, scale: float, divisor: float, address: int) -> None:
        assert 0 < size <= CAPACITY, "the loop would read and write beyond its memory"
        pairs = (size + 1) // 2
        keystream.fill(
            self._bits[: pairs * _PAIR_BYTES + SLACK], self._zeros[: pairs * _PAIR_BYTES]
        )
        k = self._address + pairs * _RADIUS_BYTES
        self._loop(self._address, k, size, scale, divisor, address)


def looped(*, may_compile: bool) -> LoopedBoxMuller | None:
    """What draws by the loop; None if there is no compiler or the loop is wrong, which is logged once.

    Args:
        may_compile: Whether it may be compiled and proved now, if it is not. The proof runs on torch's threads, which
            do not exist in a forked child.
    """
    with _compiling, torch.inference_mode(False), torch.no_grad():
        if not _found:
            if not may_compile:
                return None
            _found.append(_compile_and_prove())
    return None if _found[0] is None else LoopedBoxMuller(_found[0])


def _compile_and_prove() -> Loop | None:
    try:
        loop = compiled(SOURCE.read_text(encoding="utf-8"))
        prove(LoopedBoxMuller(loop))
    except Exception as error:  # a compiler may fail in any way; the noise is as private without
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        _log.info(
            "Noise on the CPU is made without a C compiler's help, which is as private and slower: %s (%s). A compiler "
            "is looked for in CC, then as %s.",
            reason,
            type(error).__name__,
            ", ".join(_COMPILERS),
        )
        return None
    return loop


def compiled(source: str) -> Loop:
    """The loop, compiled for this machine in a third of a second; nothing of it is left on disk.

    Args:
        source: Text of ``float32_loop.c``.

    Raises:
        RuntimeError: If no compiler takes it.
        OSError: If what it made cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="clipgrad-") as folder:
        text, library = Path(folder, "loop.c"), Path(folder, "loop.so")
        text.write_text(source, encoding="utf-8")
        complaints = []
        for command in _commands():
            full = [*command, *_FLAGS, str(text), "-o", str(library), "-lm"]
            ran = subprocess.run(
                full, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
            )
            if ran.returncode == 0:
                break
            complaints.append(f"{shlex.join(command)}: {ran.stderr.strip()}")
        else:
            raise RuntimeError("; ".join(complaints) or "there is no C compiler")
        loop: Loop = ctypes.CDLL(str(library)).clipgrad_add_gaussians
    loop.restype = None  # type: ignore[attr-defined]
    loop.argtypes = [  # type: ignore[attr-defined]
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_float, ctypes.c_void_p,
    ]  # fmt: skip
    return loop


def _commands() -> Iterator[list[str]]:
    """Compilers to try, for this very processor first."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]) is not None:
            yield [*command, "-march=native"]
            yield command


def prove(found: LoopedBoxMuller) -> None:
    """Compare with :class:`BoxMuller` on public bits, random ones and those at every edge.

    Raises:
        RuntimeError: If a value differs by more than rounding.
    """
    for size, start, scale, divisor in ((CAPACITY, 0.0, 1.0, 1.0), (4099, 1.0, 0.5, 3.0)):
        bits = _Public(found.capacity // 2)
        target = torch.full((size + 1,), start, dtype=torch.float32, device="cpu")
        found.add(bits, target[:size], scale, divisor)
        values = target.double()
        added = BoxMuller(torch.float32, found.capacity).draw(bits, size).double() * scale
        expected = torch.cat(((added + start) / divisor, target.new_tensor([start])))
        wrong = ~(
            (values - expected).abs() <= _TOLERANCE * (expected.abs() + start)
        )  # NaN is wrong too
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
        self._j = np.frombuffer(memory, "<i8", pairs).copy()
        self._k = np.frombuffer(memory, "<i4", pairs, _RADIUS_BYTES * pairs).copy()
        j, k = zip(*edges, strict=True)
        self._j[: len(edges)], self._k[: len(edges)] = j, k

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        pairs = len(zeros) // _PAIR_BYTES
        buffer[: len(zeros)] = self._j[:pairs].tobytes() + self._k[:pairs].tobytes()


def _edges(bits: int, powers: range) -> list[int]:
    """0, the ends, and what lies a power of two from either, of both signs."""
    top = 2 ** (bits - 1)
    near = {0, top - 1} | {2**k for k in powers} | {top - 2**k for k in powers}
    return sorted(near | {-1 - word for word in near})
