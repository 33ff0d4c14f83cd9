"""Turn random bits into Gaussians with the same work for every value: Box and Muller (1958), branch-free.

A pair of values takes a 64-bit integer ``j`` and an integer ``k`` of ``w`` bits, both signed:

* ``R = sqrt(-2 ln u)``, with ``u = 1/2 + j / 2^64 + 2^-53`` in float64, from 2^-53 to 1. Radii reach 8.57, and radii
  near 0 are resolved to 1e-8.
* ``a = (k + 1/2) pi / 2^w``, between ``-pi/2`` and ``pi/2``. The pair is ``R sin a`` and ``R s cos a``. The sign ``s``
  is the lowest bit of ``k``, so the point lies in any quadrant.

``cos a`` is computed as the sine of the complement to ``pi/2``, which is exact as an integer. So both values have the
full relative precision of their dtype around 0 too; ``cos`` of a rounded angle would not.

``w`` is 32 for float32, which computes everything but the radius' logarithm in float32, and 64 for float64.

With ``shared=True`` all functions are torch's, which run large operations on its threads. Otherwise logarithms, sines
and integer operations are numpy's: torch would use its threads for a logarithm of more than 2048 values, and in a
forked child those threads do not exist, so the call would hang. :mod:`clipgrad.noise.c_loop` does the same in one loop
of C.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipgrad.noise.keystream import SLACK, Bits

_Array = NDArray[Any]
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_MOST_LAYOUTS = 8  # a training run has two or three: full pieces and a remainder
_RADIUS_BYTES = 8


class _Layout(NamedTuple):
    """This class holds views of one buffer for one number of values. Integers and the floats made of them share it."""

    bits: memoryview  # the keystream is written here
    zeros: memoryview  # the cipher encrypts these
    radius_bits: Tensor  # [m] int64
    radius: Tensor  # [m] float64
    log: _Array  # radius as an array
    last_radius: Tensor  # [m] in the target's dtype; radius itself for float64
    root: _Array  # last_radius as an array
    angle_bits: Tensor  # [2, m] int32 or int64
    k: _Array  # first row of angle_bits
    complement: _Array  # second row of angle_bits
    angles: Tensor  # [2, m] float32 or float64; finally the values
    sines: _Array  # angles as an array
    values: Tensor  # [n], the first n of the 2 m angles


class BoxMuller:
    """Make float32 or float64 Gaussians in a cache-sized buffer of its own, by one thread at a time.

    ``capacity``, an even number, is the most values per call. With ``shared`` torch's threads may share the work.
    """

    def __init__(self, dtype: torch.dtype, capacity: int, *, shared: bool = False) -> None:
        self.capacity, self._shared = capacity, shared
        self._dtype, self._integer = dtype, _INTEGERS[dtype]
        bits = 8 * dtype.itemsize
        pairs = capacity // 2
        # Inference tensors could not be used outside of inference mode.
        with torch.inference_mode(False):
            memory = bytearray(pairs * (_RADIUS_BYTES + 2 * dtype.itemsize) + SLACK)
            self._bytes = memoryview(memory)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)
            # An explicit device, since PyTorch's default device may be another.
            self._small_radius = torch.empty(pairs, dtype=torch.float32, device="cpu")
            self._middle = torch.tensor(0.5 + 2.0**-53, dtype=torch.float64, device="cpu")
            half_step = math.pi / 2 ** (bits + 1)
            self._half_step = torch.tensor(half_step, dtype=dtype, device="cpu")
        self._zeros = memoryview(bytes(pairs * (_RADIUS_BYTES + dtype.itemsize)))
        self._step = math.pi / 2**bits
        word = np.dtype(f"i{dtype.itemsize}").type
        self._bits = bits
        self._top, self._all_but_top = np.array(bits - 1, word), np.array(2 ** (bits - 1) - 1, word)
        self._layouts: dict[int, _Layout] = {}

    def draw(self, keystream: Bits, size: int) -> Tensor:
        """Return ``size`` values of N(0, 1) as a flat tensor that is valid until the next call."""
        at = self._layouts.get(size) or self._layout(size)
        keystream.fill(at.bits, at.zeros)
        return self.transform(at)

    def transform(self, at: _Layout) -> Tensor:
        """Turn the bits in the buffer into values, in place."""
        radius = at.radius.copy_(at.radius_bits)
        torch.add(self._middle, radius, alpha=2.0**-64, out=radius)
        if self._shared:
            radius.log_()
        else:
            np.log(at.log, out=at.log)
        last_radius = radius if at.last_radius is radius else at.last_radius.copy_(radius)
        last_radius.mul_(-2.0)
        if self._shared:
            last_radius.sqrt_()
        else:
            np.sqrt(at.root, out=at.root)
        self._complement(at)
        angles = at.angles.copy_(at.angle_bits)
        torch.add(self._half_step, angles, alpha=self._step, out=angles)
        if self._shared:
            angles.sin_()
        else:
            np.sin(at.sines, out=at.sines)
        angles.mul_(last_radius)
        return at.values

    def _complement(self, at: _Layout) -> None:
        # Inverting all bits but the sign turns k + 1/2 into sign(k) (2^(w-1) - |k + 1/2|), the complement to pi/2.
        # Inverting all bits gives its negative. The lowest bit of k selects which of the two.
        if self._shared:
            bits, rest = at.angle_bits
            torch.bitwise_left_shift(bits, self._bits - 1, out=rest)
            rest.bitwise_right_shift_(self._bits - 1).bitwise_xor_(bits)
            rest.bitwise_xor_(2 ** (self._bits - 1) - 1)
            return
        k, complement = at.k, at.complement
        np.left_shift(k, self._top, out=complement)
        np.right_shift(complement, self._top, out=complement)
        np.bitwise_xor(complement, k, out=complement)
        np.bitwise_xor(complement, self._all_but_top, out=complement)

    def _layout(self, size: int) -> _Layout:
        pairs = (size + 1) // 2
        ends = pairs * _RADIUS_BYTES, pairs * (_RADIUS_BYTES + self._dtype.itemsize)
        after = pairs * (_RADIUS_BYTES + 2 * self._dtype.itemsize)
        with torch.inference_mode(False):
            radius = self._memory[: ends[0]].view(torch.float64)
            angles = self._memory[ends[0] : after].view(self._dtype).view(2, pairs)
            angle_bits = angles.view(self._integer)
            last = radius if self._dtype is torch.float64 else self._small_radius[:pairs]
            k, complement = angle_bits.numpy()
            layout = _Layout(
                bits=self._bytes[: ends[1] + SLACK],
                zeros=self._zeros[: ends[1]],
                radius_bits=radius.view(torch.int64),
                radius=radius,
                log=radius.numpy(),
                last_radius=last,
                root=last.numpy(),
                angle_bits=angle_bits,
                k=k,
                complement=complement,
                angles=angles,
                sines=angles.view(-1).numpy(),
                values=angles.view(-1)[:size],
            )
        if len(self._layouts) >= _MOST_LAYOUTS:
            self._layouts.clear()
        self._layouts[size] = layout
        return layout
