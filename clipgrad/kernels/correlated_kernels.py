"""This module has Triton kernels for correlated noise: one makes rows of noise ahead, the other adds a row to sums.

Each element of a Triton vector computes one block of ChaCha20, whose values are the fresh noise of ``AHEAD`` rows at
``PER_BLOCK / AHEAD`` columns. They never leave the registers.
"""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

from clipgrad.kernels.chacha_kernels import _halves, _scaled, _sums, _values, _word


@triton.jit
def _some(values, first: tl.constexpr, COUNT: tl.constexpr):
    part = (values[first],)
    for i in tl.static_range(1, COUNT):
        part = part + (values[first + i],)  # noqa: RUF005
    return part


@triton.jit
def _numbers(source, COUNT: tl.constexpr):
    found = (tl.load(source),)
    for i in tl.static_range(1, COUNT):
        found = found + (tl.load(source + i),)  # noqa: RUF005
    return found


@triton.jit
def _minus(rows, earlier, weights, first: tl.constexpr, AHEAD: tl.constexpr):
    """Subtract one past row from each new row, with the weight of their distance."""
    changed = (rows[0] - weights[first] * earlier,)
    for k in tl.static_range(1, AHEAD):
        changed = changed + (rows[k] - weights[first + k] * earlier,)  # noqa: RUF005
    return changed


@triton.jit
def _minus_each_other(rows, tail, AHEAD: tl.constexpr):
    """Subtract new rows from the new rows after them."""
    done = (rows[0],)
    for k in tl.static_range(1, AHEAD):
        row = rows[k]
        for lag in tl.static_range(1, k + 1):
            row -= tl.load(tail + lag - 1) * done[k - lag]
        done = done + (row,)  # noqa: RUF005
    return done


# The address of a part of a tensor may be odd, and a kernel that was compiled for even ones is kept.
ARGUMENTS = (
    "ring", "tail", "stride", "count", "first", "known", "start", "end", "chunk", "scale",
    "k01", "k23", "k45", "k67", "one",
)  # fmt: skip


@triton.jit(do_not_specialize=ARGUMENTS)
def make_rows(
    ring, tail, stride: tl.int64, count: tl.int32, first: tl.int32, known: tl.int32,
    start: tl.int64, end: tl.int64, chunk: tl.int64, scale: tl.int64,
    k01: tl.int64, k23: tl.int64, k45: tl.int64, k67: tl.int64, one: tl.int32,
    DRAWS: tl.constexpr, TYPE: tl.constexpr, PER_BLOCK: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace ``AHEAD`` rows of the ring, from row ``first`` on, at the columns from ``start`` to ``end``.

    The new row k is fresh noise minus ``tail[lag - 1]`` times the row that is ``lag`` rows earlier, for each lag. Only
    ``known`` rows before row ``first`` hold past noise. ``count`` is the number of rows of the ring. Behind the last
    coefficient ``tail`` holds ``2 * AHEAD`` zeros. Each program makes ``chunk`` columns, and uses ``chunk * AHEAD /
    PER_BLOCK * DRAWS`` blocks of its own. ``scale`` is float64 bits, each ``k`` two words of the key.
    """
    COLUMNS: tl.constexpr = PER_BLOCK // AHEAD
    scale = scale.to(tl.int64).to(tl.float64, bitcast=True)
    one = _word(one)
    k0, k1 = _halves(k01)
    k2, k3 = _halves(k23)
    k4, k5 = _halves(k45)
    k6, k7 = _halves(k67)
    lane = tl.arange(0, BLOCK)
    own = tl.program_id(0).to(tl.int64) * chunk
    until = tl.minimum(own + chunk, end - start)
    for begin in range(own, until, BLOCK * COLUMNS):
        counter = (begin // COLUMNS + lane).to(tl.uint32) * DRAWS
        noise = _values(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one, TYPE)
        for _ in tl.static_range(1, DRAWS):
            counter += 1
            more = _values(counter, k0, k1, k2, k3, k4, k5, k6, k7, scale, one, TYPE)
            noise = _sums(noise, more, PER_BLOCK)
        for group in tl.static_range(COLUMNS):
            column = begin + group * BLOCK + lane
            inside = column < until
            place = ring + start + column
            rows = _some(noise, group * AHEAD, AHEAD)
            for age in range(0, known, AHEAD):
                weights = _numbers(tail + age, 2 * AHEAD - 1)
                for i in tl.static_range(AHEAD):
                    at = first - 1 - age - i
                    at = tl.where(at < 0, at + count, at).to(tl.int64)
                    # Memory that never held a row may hold NaN.
                    there = column < tl.where(known > age + i, until, 0)
                    earlier = tl.load(place + at * stride, mask=there, other=0.0)
                    rows = _minus(rows, earlier, weights, i, AHEAD)
            rows = _minus_each_other(rows, tail, AHEAD)
            for k in tl.static_range(AHEAD):
                at = first + k
                at = tl.where(at < count, at, at - count).to(tl.int64)
                tl.store(place + at * stride, rows[k], mask=inside)


@triton.jit(do_not_specialize=["sources", "targets", "places", "row", "factor"])
def add_row(
    sources, targets, places, row, factor: tl.int64,
    TYPE: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a row of noise to one part of a tensor per program, and multiply the sum by the factor.

    Three int64 tables hold for each program the address of its part, that for the result, or the place of its noise in
    the row, and the number of values. ``factor`` is float64 bits.
    """
    program = tl.program_id(0)
    source = tl.load(sources + 2 * program).to(tl.pointer_type(TYPE))
    target = tl.load(targets + 2 * program).to(tl.pointer_type(TYPE))
    noise = row + tl.load(places + 2 * program)
    size = tl.load(sources + 2 * program + 1).to(tl.int32)
    factor = factor.to(tl.int64).to(tl.float64, bitcast=True).to(NOISE)
    lane = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        inside = lane < size - start
        before = tl.load(source + start + lane, mask=inside, other=0.0)
        added = tl.load(noise + start + lane, mask=inside, other=0.0)
        tl.store(target + start + lane, _scaled(before, added, factor, TYPE), mask=inside)
