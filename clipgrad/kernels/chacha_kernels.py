"""This module has Triton kernels for ChaCha20 and the Gaussians made from its keystream.

Each element of a Triton vector computes one block (RFC 8439, section 2.3) of 64 bytes: eight float64 values, or sixteen
float32 values, which half-precision targets use as well.
"""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

from clipgrad.kernels.box_muller_kernels import pair_float32, pair_float64


@triton.jit
def _rotate(x, n: tl.constexpr):
    return (x << n) | (x >> (32 - n))


@triton.jit
def _quarter_round(a, b, c, d, one):
    """Compute the quarter round of RFC 8439, section 2.1.

    ``one`` is 1, and not a constant for the compiler: ``a * one + b`` runs on the idle multipliers, while ``a + b``
    would wait for the units that rotate and xor.
    """
    a = a * one + b
    d = _rotate(d ^ a, 16)
    c = d * one + c
    b = _rotate(b ^ c, 12)
    a = b * one + a
    d = _rotate(d ^ a, 8)
    c = d * one + c
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(x):
    return x.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _block(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, one):
    """Return the sixteen words of one block per counter; key and nonce are int32 scalars, the counter is uint32.

    Only the counter, in the first column, differs between blocks. So the first round computes the other three columns
    as scalars, once for all blocks of a program.
    """
    s0 = counter * 0 + 0x61707865
    s1 = tl.full([], 0x3320646E, tl.uint32)
    s2 = tl.full([], 0x79622D32, tl.uint32)
    s3 = tl.full([], 0x6B206574, tl.uint32)
    s4, s5, s6, s7, s8, s9 = _word(k0), _word(k1), _word(k2), _word(k3), _word(k4), _word(k5)
    s10, s11, s13, s14, s15 = _word(k6), _word(k7), _word(n0), _word(n1), _word(n2)
    x0, x4, x8, x12 = _quarter_round(s0, s4, s8, counter, one)
    x1, x5, x9, x13 = _quarter_round(s1, s5, s9, s13, one)
    x2, x6, x10, x14 = _quarter_round(s2, s6, s10, s14, one)
    x3, x7, x11, x15 = _quarter_round(s3, s7, s11, s15, one)
    x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15, one)
    x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12, one)
    x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13, one)
    x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14, one)
    for _ in range(9):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12, one)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13, one)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14, one)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15, one)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15, one)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12, one)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13, one)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14, one)
    return (
        x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7,
        x8 + s8, x9 + s9, x10 + s10, x11 + s11, x12 + counter, x13 + s13, x14 + s14, x15 + s15,
    )  # fmt: skip


@triton.jit
def _eight(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one):
    """Return eight float64 values per block; the nonce is 0, because each key is used once."""
    zero = k0 * 0
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _block(
        counter, k0, k1, k2, k3, k4, k5, k6, k7, zero, zero, zero, one
    )
    g0, g1 = pair_float64(w0, w1, w2, w3, scale)
    g2, g3 = pair_float64(w4, w5, w6, w7, scale)
    g4, g5 = pair_float64(w8, w9, w10, w11, scale)
    g6, g7 = pair_float64(w12, w13, w14, w15, scale)
    return g0, g1, g2, g3, g4, g5, g6, g7


@triton.jit
def _sixteen(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one):
    """Return sixteen float32 values per block; the nonce is 0, because each key is used once."""
    zero = k0 * 0
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _block(
        counter, k0, k1, k2, k3, k4, k5, k6, k7, zero, zero, zero, one
    )
    scale = scale.to(tl.float32)
    g0, g1 = pair_float32(w0, w1, scale)
    g2, g3 = pair_float32(w2, w3, scale)
    g4, g5 = pair_float32(w4, w5, scale)
    g6, g7 = pair_float32(w6, w7, scale)
    g8, g9 = pair_float32(w8, w9, scale)
    g10, g11 = pair_float32(w10, w11, scale)
    g12, g13 = pair_float32(w12, w13, scale)
    g14, g15 = pair_float32(w14, w15, scale)
    return g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15


@triton.jit
def _values(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one, TYPE: tl.constexpr):
    if tl.float64 == TYPE:
        return _eight(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one)
    else:
        return _sixteen(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one)


@triton.jit
def _sums(values, others, PER_BLOCK: tl.constexpr):
    sums = (values[0] + others[0],)
    for i in tl.static_range(1, PER_BLOCK):
        sums = sums + (values[i] + others[i],)  # noqa: RUF005
    return sums


@triton.jit
def _load(source, left, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Load the next values, at most ``left`` of them; neighbouring vector elements read neighbouring values."""
    lane = tl.arange(0, BLOCK)
    if left >= PER_BLOCK * BLOCK:  # masks would cost a tenth of the cipher's time
        found = (tl.load(source + lane),)
        for i in tl.static_range(1, PER_BLOCK):
            found = found + (tl.load(source + i * BLOCK + lane),)  # noqa: RUF005
    else:
        found = (tl.load(source + lane, mask=lane < left, other=0.0),)
        for i in tl.static_range(1, PER_BLOCK):
            inside = lane < left - i * BLOCK
            found = found + (tl.load(source + i * BLOCK + lane, mask=inside, other=0.0),)  # noqa: RUF005
    return found


@triton.jit
def _scaled(before, noise, factor, TYPE: tl.constexpr):
    total = (before.to(noise.dtype) + noise).to(TYPE)
    return (total.to(noise.dtype) * factor.to(noise.dtype)).to(TYPE)


@triton.jit
def _store(
    target, left, before, noise, factor,
    TYPE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    if left >= PER_BLOCK * BLOCK:
        for i in tl.static_range(PER_BLOCK):
            scaled = _scaled(before[i], noise[i], factor, TYPE)
            tl.store(target + i * BLOCK + lane, scaled)
    else:
        for i in tl.static_range(PER_BLOCK):
            scaled = _scaled(before[i], noise[i], factor, TYPE)
            tl.store(target + i * BLOCK + lane, scaled, mask=lane < left - i * BLOCK)


@triton.jit
def _halves(word):
    word = word.to(tl.int64)
    return word.to(tl.int32), (word >> 32).to(tl.int32)


ARGUMENTS = ("chunk", "first", "scale", "factor", "k01", "k23", "k45", "k67", "one")


@triton.jit(do_not_specialize=ARGUMENTS)
def add_gaussian(
    sources, targets, chunk: tl.int32, first: tl.int64, scale: tl.int64, factor: tl.int64,
    k01: tl.int64, k23: tl.int64, k45: tl.int64, k67: tl.int64, one: tl.int32,
    DRAWS: tl.constexpr, TYPE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add noise to one part of a tensor per program, and multiply the sum by the factor.

    Two int64 tables hold for each program the address of its part, or that for the result, and the number of values,
    at most ``chunk``. Only program p uses the ``chunk / PER_BLOCK * DRAWS`` blocks from
    ``first + p * chunk / PER_BLOCK * DRAWS`` on. ``scale`` and ``factor`` are float64 bits, each ``k`` two key words.
    """
    program = tl.program_id(0)
    source = tl.load(sources + 2 * program).to(tl.pointer_type(TYPE))
    target = tl.load(targets + 2 * program).to(tl.pointer_type(TYPE))
    count = tl.load(sources + 2 * program + 1).to(tl.int32)
    scale = scale.to(tl.int64).to(tl.float64, bitcast=True)
    factor = factor.to(tl.int64).to(tl.float64, bitcast=True)
    one = _word(one)
    k0, k1 = _halves(k01)
    k2, k3 = _halves(k23)
    k4, k5 = _halves(k45)
    k6, k7 = _halves(k67)
    lane = tl.arange(0, BLOCK)
    own = (program * (chunk // PER_BLOCK)).to(tl.uint32)
    for start in range(0, count, PER_BLOCK * BLOCK):
        # The values are loaded first, so that the loads run while the cipher computes.
        before = _load(source + start, count - start, PER_BLOCK, BLOCK)
        index = (start // PER_BLOCK + lane).to(tl.uint32) + own
        counter = index * DRAWS + first.to(tl.uint32)
        noise = _values(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one, TYPE)
        for _ in tl.static_range(1, DRAWS):
            counter += 1
            more = _values(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one, TYPE)
            noise = _sums(noise, more, PER_BLOCK)
        _store(target + start, count - start, before, noise, factor, TYPE, PER_BLOCK, BLOCK)


KEY = ("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7")


@triton.jit(do_not_specialize=["first", *KEY, "n0", "n1", "n2", "one"])
def store_blocks(
    out, first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, one, BLOCK: tl.constexpr
):  # fmt: skip
    """Store the keystream for the comparison with published vectors; ``out`` is int32 [BLOCK, 16]."""
    lane = tl.arange(0, BLOCK)
    counter = lane.to(tl.uint32) + first.to(tl.uint32, bitcast=True)
    words = _block(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, _word(one))
    for word in tl.static_range(16):
        tl.store(out + lane * 16 + word, words[word].to(tl.int32, bitcast=True))


@triton.jit
def store_pairs(words, out, BLOCK: tl.constexpr):
    """Store pairs made from given words for the self-test; ``words`` is int32 and ``out`` float32, both [BLOCK, 2]."""
    lane = tl.arange(0, BLOCK)
    w0 = tl.load(words + 2 * lane).to(tl.uint32, bitcast=True)
    w1 = tl.load(words + 2 * lane + 1).to(tl.uint32, bitcast=True)
    g0, g1 = pair_float32(w0, w1, 1.0)
    tl.store(out + 2 * lane, g0)
    tl.store(out + 2 * lane + 1, g1)
