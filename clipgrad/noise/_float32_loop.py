"""The transform of :mod:`clipgrad.noise._box_muller` for float32, written to be compiled into one loop.

The same formulas, step by step, but for two functions that take a library half as long again as all the rest: the
logarithm of a float64 between 2^-53 and 1, and the sine of an angle between ``-pi/2`` and ``pi/2``. Here they have the
precision of float32, relative and around their zeros too, and no more. Uncompiled all of it is as right, and slow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP = math.pi / 2**32
_ONE, _ROOT_HALF = 0x3F800000, 0x3F3504F3  # the bits of 1 and sqrt(1/2) in float32
# log(1 + f) = f - f^2/2 + f^3 P(f) between sqrt(1/2) and sqrt(2): Moshier, "Methods and Programs for Mathematical
# Functions" (1989), Cephes' logf. Relative error 1e-8.
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
# sin(a) = a + a^3 Q(a^2) up to pi/2: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 4.3.97.
# Relative error 2e-9.
_SINE = (-2.39e-8, 2.7526e-6, -1.984090e-4, 8.3333315e-3, -1.666666664e-1)


def gaussians(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    """Write the pair of values that belongs to each pair of integers.

    Args:
        j: ``[m]`` int64, of which the radius is made.
        k: ``[m]`` int32, of which the angle is made.
        sines: ``[m]`` float32, written to.
        cosines: ``[m]`` float32, written to.
    """
    u = j.to(torch.float64) * 2.0**-64 + (0.5 + 2.0**-53)
    radius = torch.sqrt(-2.0 * log(u))
    complement = (k << 31 >> 31) ^ k ^ 0x7FFFFFFF
    sines.copy_(sine(k.to(torch.float32) * _STEP + _STEP / 2) * radius)
    cosines.copy_(sine(complement.to(torch.float32) * _STEP + _STEP / 2) * radius)


def log(u: Tensor) -> Tensor:
    """Of a float64 between 2^-53 and 1, in float32."""
    # u = 2^e (1 + f), with 1 + f between sqrt(1/2) and sqrt(2). f is exact in float64, then rounded relative to itself:
    # nothing is lost where u is close to 1.
    e = (u.to(torch.float32).view(torch.int32) - _ROOT_HALF) >> 23
    power = (_ONE - (e << 23)).view(torch.float32)  # 2^-e
    f = (u * power.to(torch.float64) - 1.0).to(torch.float32)
    square = f * f
    return e.to(torch.float32) * math.log(2.0) + (f + square * (f * _polynomial(_LOG, f) - 0.5))


def sine(a: Tensor) -> Tensor:
    """Of a float32 between ``-pi/2`` and ``pi/2``."""
    square = a * a
    return a + a * (square * _polynomial(_SINE, square))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's scheme, the highest power first."""
    first, second, *others = coefficients
    value = x * first + second
    for coefficient in others:
        value = value * x + coefficient
    return value
