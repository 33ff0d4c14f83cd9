"""Make float32 Gaussians by one loop in C, which is verified before use and needs a C compiler."""

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
"""Arguments are ``(j, k, size, scale, divisor, target)``, arrays by their addresses; see ``float32_loop.c``."""

# A piece, its bits and the zeros for the cipher take 512 KiB and stay in the cache of one core.
CAPACITY = 2**15
SOURCE = Path(__file__).with_name("float32_loop.c")
_COMPILERS = ("cc", "gcc", "clang")
# Products and sums may fuse. The compiler vectorises the loop only if functions set no errno and nothing traps.
_FLAGS = (
    "-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
_SECONDS = 60
_BYTES = 4  # size of a float32
_RADIUS_BYTES, _PAIR_BYTES = 8, 12
_REPLACE = 0.0  # a divisor that replaces values instead of adding to them
_TOLERANCE = 1e-6  # relative; rounding alone reaches 4e-7
_log = logging.getLogger("clipgrad")
_found: list[Loop | None] = []
_compiling = threading.Lock()


def _forked() -> None:
    """Replace the lock: a thread of the parent that held it does not exist in the child."""
    global _compiling
    _compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class LoopedBoxMuller:
    """Make float32 Gaussians in a buffer of its own, by the loop that :func:`compile_loop` returned.

    Only one thread may use an object at a time. ``capacity`` is the largest number of values per call of :meth:`draw`.
    """

    capacity = CAPACITY

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        memory = bytearray(_PAIR_BYTES * CAPACITY // 2 + SLACK)
        self._bits, self._zeros = memoryview(memory), memoryview(bytes(len(memory) - SLACK))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # Inference tensors could not be used outside of inference mode.
        with torch.inference_mode(False):
            self._values = torch.empty(CAPACITY, dtype=torch.float32, device="cpu")

    def draw(self, keystream: Bits, size: int) -> Tensor:
        """Return ``size`` values of N(0, 1) as a flat tensor that is valid until the next call."""
        values = self._values[:size]
        self._add(keystream, size, 1.0, _REPLACE, values.data_ptr())
        return values

    def add(self, keystream: Bits, target: Tensor, scale: float, divisor: float = 1.0) -> None:
        """Add ``scale * N(0, 1)`` to each value of a contiguous float32 tensor of any size, and divide the sums.

        The loop writes by address. A tensor operation would check the grad mode, which each thread has for itself; so
        any thread may call this method.
        """
        assert target.dtype is torch.float32, "the loop handles float32 only"
        for start, count in _pieces(target.numel()):
            self._add(keystream, count, scale, divisor, target.data_ptr() + _BYTES * start)
        if not target.is_inference():
            # Autograd and other users of version counters do not notice a write by address.
            torch.autograd.graph.increment_version(target)

    def fill(self, keystream: Bits, target: Tensor, size: int, scale: float) -> None:
        """Replace the first ``size`` values of a tensor that nobody else sees by ``scale * N(0, 1)``."""
        assert target.dtype is torch.float32, "the loop handles float32 only"
        assert size <= target.numel(), "the loop would write beyond the tensor"
        for start, count in _pieces(size):
            address = target.data_ptr() + _BYTES * start
            self._add(keystream, count, scale, _REPLACE, address)

    def _add(self, keystream: Bits, size: int, scale: float, divisor: float, address: int) -> None:
        assert 0 < size <= CAPACITY, "the loop would read and write beyond its buffer"
        pairs = (size + 1) // 2
        keystream.fill(
            self._bits[: pairs * _PAIR_BYTES + SLACK], self._zeros[: pairs * _PAIR_BYTES]
        )
        k = self._address + pairs * _RADIUS_BYTES
        self._loop(self._address, k, size, scale, divisor, address)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size of pieces that the loop takes at once."""
    for start in range(0, size, CAPACITY):
        yield start, min(CAPACITY, size - start)


def make_looped(*, may_compile: bool) -> LoopedBoxMuller | None:
    """Return an object that uses the loop, or None if it cannot be compiled or is wrong; log the reason once.

    ``may_compile`` allows to compile and verify the loop now, if that has not been done. The verification runs on
    torch's threads, which do not exist in a forked child.
    """
    with _compiling, torch.inference_mode(False), torch.no_grad():
        if not _found:
            if not may_compile:
                return None
            _found.append(_compile_and_verify())
    return None if _found[0] is None else LoopedBoxMuller(_found[0])


def _compile_and_verify() -> Loop | None:
    try:
        loop = compile_loop(SOURCE.read_text(encoding="utf-8"))
        verify(LoopedBoxMuller(loop))
    except Exception as error:  # a compiler can fail in any way; uncompiled noise is as private
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        _log.info(
            "Noise on the CPU is made without a C compiler, which is as private and slower: %s (%s). clipgrad takes "
            "the compiler that CC names, or else the first that works of %s.",
            reason,
            type(error).__name__,
            ", ".join(_COMPILERS),
        )
        return None
    return loop


def compile_loop(source: str) -> Loop:
    """Compile the text of ``float32_loop.c``; see :func:`compile_library`."""
    loop: Loop = compile_library(source).clipgrad_add_gaussians
    loop.restype = None  # type: ignore[attr-defined]
    loop.argtypes = [  # type: ignore[attr-defined]
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_float, ctypes.c_void_p,
    ]  # fmt: skip
    return loop


def compile_library(source: str) -> ctypes.CDLL:
    """Compile a text in C for this machine, in a third of a second, and leave nothing on disk.

    Raises:
        RuntimeError: If no compiler accepts the source.
        OSError: If the library cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="clipgrad-") as folder:
        text, built = Path(folder, "loop.c"), Path(folder, "loop.so")
        text.write_text(source, encoding="utf-8")
        complaints = []
        for command in _commands():
            full = [*command, *_FLAGS, str(text), "-o", str(built), "-lm"]
            ran = subprocess.run(
                full, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
            )
            if ran.returncode == 0:
                break
            complaints.append(f"{shlex.join(command)}: {ran.stderr.strip()}")
        else:
            raise RuntimeError("; ".join(complaints) or "there is no C compiler")
        return ctypes.CDLL(str(built))


def _commands() -> Iterator[list[str]]:
    """Return compilers to try, first with the flag for this very processor."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]) is not None:
            yield [*command, "-march=native"]
            yield command


def verify(found: LoopedBoxMuller) -> None:
    """Compare with :class:`BoxMuller` on public bits: pseudo-random bits and all edge cases."""
    for size, start, scale, divisor in (
        (CAPACITY, 0.0, 1.0, 1.0),
        (4099, 1.0, 0.5, 3.0),
        (4097, 7.0, 0.5, _REPLACE),
    ):
        bits = _PublicBits(found.capacity // 2)
        target = torch.full((size + 1,), start, dtype=torch.float32, device="cpu")
        if divisor == _REPLACE:
            found.fill(bits, target, size, scale)
        else:
            found.add(bits, target[:size], scale, divisor)
        values = target.double()
        added = BoxMuller(torch.float32, found.capacity).draw(bits, size).double() * scale
        wanted = added if divisor == _REPLACE else (added + start) / divisor
        expected = torch.cat((wanted, target.new_tensor([start])))
        # This form rejects NaN too.
        wrong = ~(
            (values - expected).abs() <= _TOLERANCE * (expected.abs() + (start if divisor else 0.0))
        )
        if wrong.any():
            at = int(wrong.int().argmax())
            raise RuntimeError(
                f"the compiled transform computes {float(values[at])} where {float(expected[at])} is right"
            )


class _PublicBits:
    """This class provides public bits that do not come from a cipher."""

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
    """Return 0, both ends, and the integers a power of two away from either, of both signs."""
    top = 2 ** (bits - 1)
    near = {0, top - 1} | {2**k for k in powers} | {top - 2**k for k in powers}
    return sorted(near | {-1 - word for word in near})
