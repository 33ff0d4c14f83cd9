"""ChaCha20 and the Gaussians made of it as Triton kernels. Needs Triton.

One lane computes one block (RFC 8439, section 2.3): 64 bytes, four Box-Muller pairs, eight values. Angles
are those of :mod:`clipgrad.noise._box_muller`, radii ``sqrt(-ln u^2)`` with ``u = (j + 1/2) / 2^63``,
which reach 9.4. All is float64: CUDA's fast float32 logarithm, sine and cosine are too coarse near 0.
"""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def _rotate(x, n: tl.constexpr):
    return (x << n) | (x >> (32 - n))


@triton.jit
def _quarter_round(a, b, c, d):
    """RFC 8439, section 2.1."""
    a += b
    d = _rotate(d ^ a, 16)
    c += d
    b = _rotate(b ^ c, 12)
    a += b
    d = _rotate(d ^ a, 8)
    c += d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(x, BLOCK: tl.constexpr):
    return tl.zeros([BLOCK], tl.uint32) + x.to(tl.uint32, bitcast=True)


@triton.jit
def _block(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, BLOCK: tl.constexpr):
    """The sixteen words of the block of each lane. Key and nonce are int32, the counter uint32."""
    s0 = tl.full([BLOCK], 0x61707865, tl.uint32)
    s1 = tl.full([BLOCK], 0x3320646E, tl.uint32)
    s2 = tl.full([BLOCK], 0x79622D32, tl.uint32)
    s3 = tl.full([BLOCK], 0x6B206574, tl.uint32)
    s4, s5, s6, s7 = _word(k0, BLOCK), _word(k1, BLOCK), _word(k2, BLOCK), _word(k3, BLOCK)
    s8, s9, s10, s11 = _word(k4, BLOCK), _word(k5, BLOCK), _word(k6, BLOCK), _word(k7, BLOCK)
    s13, s14, s15 = _word(n0, BLOCK), _word(n1, BLOCK), _word(n2, BLOCK)
    x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, s4, s5, s6, s7
    x8, x9, x10, x11, x12, x13, x14, x15 = s8, s9, s10, s11, counter, s13, s14, s15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7,
        x8 + s8, x9 + s9, x10 + s10, x11 + s11, x12 + counter, x13 + s13, x14 + s14, x15 + s15,
    )  # fmt: skip


@triton.jit
def _int64(low, high):
    both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return both.to(tl.int64, bitcast=True)


@triton.jit
def _pair(w0, w1, w2, w3):
    """Two Gaussians of four words."""
    j, k = _int64(w0, w1), _int64(w2, w3)
    u = j.to(tl.float64) * 1.0842021724855044e-19 + 5.421010862427522e-20  # 2^-63, 2^-64
    radius = tl.sqrt(-tl.log(u * u))
    complement = k ^ 0x7FFFFFFFFFFFFFFF ^ (-(k & 1))
    # pi / 2^64, pi / 2^65
    a = k.to(tl.float64) * 1.7030607900432772e-19 + 8.515303950216386e-20
    c = complement.to(tl.float64) * 1.7030607900432772e-19 + 8.515303950216386e-20
    return radius * tl.sin(a), radius * tl.sin(c)


@triton.jit
def _eight(counter, k0, k1, k2, k3, k4, k5, k6, k7, BLOCK: tl.constexpr):
    """Eight Gaussians in each lane, from one block. The nonce is 0: each key is used once."""
    zero = k0 * 0
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _block(
        counter, k0, k1, k2, k3, k4, k5, k6, k7, zero, zero, zero, BLOCK
    )
    g0, g1 = _pair(w0, w1, w2, w3)
    g2, g3 = _pair(w4, w5, w6, w7)
    g4, g5 = _pair(w8, w9, w10, w11)
    g6, g7 = _pair(w12, w13, w14, w15)
    return g0, g1, g2, g3, g4, g5, g6, g7


@triton.jit
def _add(target, offset, count, noise, TYPE: tl.constexpr):
    inside = offset < count
    total = tl.load(target + offset, mask=inside, other=0.0).to(tl.float64) + noise
    if tl.float64 != TYPE:
        total = total.to(tl.float32)
    tl.store(target + offset, total.to(TYPE), mask=inside)


KEY = ("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7")


@triton.jit(do_not_specialize=["first", *KEY])
def add_gaussian(
    table, chunk, first, k0, k1, k2, k3, k4, k5, k6, k7,
    DRAWS: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program ``p`` adds noise to its part of a tensor.

    The table is int64: the bits of the scale as a float64, then for each program the address of its
    part and the number of values there, at most ``chunk``. Program p has the blocks from
    ``first + p * chunk / 8 * DRAWS`` on for itself.
    """
    program = tl.program_id(0)
    scale = tl.load(table).to(tl.float64, bitcast=True)
    target = tl.load(table + 1 + 2 * program).to(tl.pointer_type(TYPE))
    count = tl.load(table + 2 + 2 * program)
    lane = tl.arange(0, BLOCK)
    own = (program * (chunk // 8)).to(tl.uint32, bitcast=True)
    for start in range(0, count.to(tl.int32), 8 * BLOCK):
        index = (start // 8 + lane).to(tl.uint32) + own
        counter = index * DRAWS + first.to(tl.uint32, bitcast=True)
        g0, g1, g2, g3, g4, g5, g6, g7 = _eight(counter, k0, k1, k2, k3, k4, k5, k6, k7, BLOCK)
        for _ in tl.static_range(1, DRAWS):
            counter += 1
            h0, h1, h2, h3, h4, h5, h6, h7 = _eight(counter, k0, k1, k2, k3, k4, k5, k6, k7, BLOCK)
            g0, g1, g2, g3 = g0 + h0, g1 + h1, g2 + h2, g3 + h3
            g4, g5, g6, g7 = g4 + h4, g5 + h5, g6 + h6, g7 + h7
        # Neighbouring lanes write to neighbouring values.
        at = start + lane
        _add(target, at, count, g0 * scale, TYPE)
        _add(target, at + BLOCK, count, g1 * scale, TYPE)
        _add(target, at + 2 * BLOCK, count, g2 * scale, TYPE)
        _add(target, at + 3 * BLOCK, count, g3 * scale, TYPE)
        _add(target, at + 4 * BLOCK, count, g4 * scale, TYPE)
        _add(target, at + 5 * BLOCK, count, g5 * scale, TYPE)
        _add(target, at + 6 * BLOCK, count, g6 * scale, TYPE)
        _add(target, at + 7 * BLOCK, count, g7 * scale, TYPE)


@triton.jit(do_not_specialize=["first", *KEY, "n0", "n1", "n2"])
def store_blocks(
    out, first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, BLOCK: tl.constexpr
):  # fmt: skip
    """The keystream itself, for the comparison with published vectors: ``out`` is int32 [BLOCK, 16]."""
    lane = tl.arange(0, BLOCK)
    counter = lane.to(tl.uint32) + first.to(tl.uint32, bitcast=True)
    words = _block(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, BLOCK)
    for word in tl.static_range(16):
        tl.store(out + lane * 16 + word, words[word].to(tl.int32, bitcast=True))
