"""This module turns random bits into pairs of Gaussians in Triton, as :mod:`clipgrad.noise.box_muller` does.

**float64** uses 128 bits per pair. Radii are ``sqrt(-ln u^2)`` with ``u = (j + 1/2) / 2^63`` and a signed 64-bit
``j``, and reach 9.4. Angles are computed as on CPU.

**float32** uses 64 bits per pair, two words ``w0`` and ``w1``, and only float32 arithmetic:

* ``u = (w0 2^20 + l + 1/2) / 2^52`` is uniform with 52 bits. Radii ``sqrt(-2 ln u)`` reach 8.57, as on CPU.
* ``b = (r + 1/2) (pi / 2) / 2^30`` is the angle to the nearer axis, where the signed ``r`` is the upper 30 bits of
  ``w1``. The lowest bit of ``w1`` selects the side of the other axis, the second lowest bit the nearer axis.
* ``l`` is the lower 20 bits of ``r``, so the least significant bits of radius and angle are the same bits. Both ``u``
  and the angle are exactly uniform. The angle is independent of the upper 32 bits of ``u``; ``u`` is independent of
  the quadrant and the upper 10 bits of ``r``, so for any ``u`` each of 2^12 equal sectors has equal probability. With
  32 separate bits each, radii would end at 6.7; with 40 and 24 bits, angles would have gaps in float32.

Both tails of the logarithm keep float32's relative precision: with a signed ``w0`` the same formula gives ``u`` for
``u < 1/2`` and ``u - 1`` otherwise, and near 1 the logarithm of ``u`` is a polynomial in ``u - 1``. The float32 code
does not call logarithm, sine or cosine: Triton's are hardware approximations, too coarse near 1 and 0. The square root
is the hardware's, with a relative error of at most 2^-23. In total a value is within 2^-21 of the exact value.
"""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def _int64(low, high):
    both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return both.to(tl.int64, bitcast=True)


@triton.jit
def pair_float64(w0, w1, w2, w3, scale):
    """Return two float64 Gaussians with standard deviation ``scale``, made from four words."""
    j, k = _int64(w0, w1), _int64(w2, w3)
    u = j.to(tl.float64) * 1.0842021724855044e-19 + 5.421010862427522e-20  # 2^-63, 2^-64
    radius = tl.sqrt(-tl.log(u * u)) * scale
    complement = k ^ 0x7FFFFFFFFFFFFFFF ^ (-(k & 1))
    # pi / 2^64, pi / 2^65
    a = k.to(tl.float64) * 1.7030607900432772e-19 + 8.515303950216386e-20
    c = complement.to(tl.float64) * 1.7030607900432772e-19 + 8.515303950216386e-20
    return radius * tl.sin(a), radius * tl.sin(c)


@triton.jit
def _minus_two_log1p(f):
    """Return ``-2 ln(1 + f)`` for ``f`` in -0.293 to 0.415, with a relative error below 2^-24.9 before rounding."""
    g = -0.17469681799411774 * f + 0.28615042567253113
    g = g * f - 0.2983594834804535
    g = g * f + 0.33141016960144043
    g = g * f - 0.39924144744873047
    g = g * f + 0.5000351071357727
    g = g * f - 0.6666790246963501
    g = g * f + 0.9999998211860657
    return f * (g * f - 2.0)


@triton.jit
def _minus_two_log(v):
    """Return ``-2 ln u`` of ``v``, where ``v`` is ``u`` if positive, ``u - 1`` if negative, and ``|v| <= 1/2``."""
    one = ((v.to(tl.uint32, bitcast=True) >> 31) * 0x3F800000).to(tl.float32, bitcast=True)
    u = v + one
    bits = u.to(tl.int32, bitcast=True)
    # The remaining mantissa lies in sqrt(1/2) to sqrt(2).
    exponent = (bits - 0x3F3504F3) & -0x800000
    mantissa = (bits - exponent).to(tl.float32, bitcast=True)
    # This is the rounding error of u, which holds all digits of f where u is near 1.
    lost = v - (u - one)
    f = (mantissa - 1.0) + lost
    return exponent.to(tl.float32) * -1.652591659164292e-07 + _minus_two_log1p(f)  # -2 ln 2 / 2^23


@triton.jit
def pair_float32(w0, w1, scale):
    """Return two float32 Gaussians with standard deviation ``scale``, made from two words."""
    high, low = w0.to(tl.int32, bitcast=True), (w1 & 0x3FFFFC).to(tl.int32)
    fine = low.to(tl.float32) * 5.551115123125783e-17 + 1.1102230246251565e-16  # 2^-54, 2^-53
    v = high.to(tl.float32) * 2.3283064365386963e-10 + fine  # 2^-32
    radius = tl.sqrt(_minus_two_log(v)) * scale
    turned = (radius.to(tl.uint32, bitcast=True) ^ (w1 << 31)).to(tl.float32, bitcast=True)
    quarters = (w1.to(tl.int32, bitcast=True) >> 2).to(tl.float32)
    quarters = quarters * 9.313225746154785e-10 + 4.656612873077393e-10  # 2^-30, 2^-31: -1/2 to 1/2
    z = quarters * quarters
    # sin(pi x / 2) / x and cos(pi x / 2), with relative errors below 2^-24.4 and 2^-24.6 before rounding
    s = (-0.004690333269536495 * z + 0.07971390336751938) * z - 0.6459667086601257
    s = s * z + 1.5707963705062866
    c = (-0.020417282357811928 * z + 0.2536032199859619) * z - 1.2336976528167725
    c = c * z + 1.0
    near, far = radius * (quarters * s), turned * c
    swapped = (w1 & 2) != 0
    return tl.where(swapped, far, near), tl.where(swapped, near, far)
