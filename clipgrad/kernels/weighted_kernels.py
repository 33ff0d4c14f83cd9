"""This Triton kernel adds up products of half-precision factors, each product scaled by its sample's factor."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def weighted_product(
    left,
    right,
    factors,
    out,
    samples,
    samples_each,
    positions,
    rows,
    columns,
    left_sample_stride,
    left_position_stride,
    right_sample_stride,
    right_position_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """Write one block of ``out[part] = sum_b factors[b] left[b]^T right[b]`` over the samples of one part.

    A sample with a zero factor is skipped, so its values do not matter. Blocks are numbered in bands of ``BAND`` blocks
    of rows, so that programs which run together read the same factors.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band = block // (BAND * across)
    height = min(down - band * BAND, BAND)
    place = block % (BAND * across)
    row = (band * BAND + place % height) * ROWS + tl.arange(0, ROWS)
    column = (place // height) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = part * samples_each
    left += first.to(tl.int64) * left_sample_stride
    right += first.to(tl.int64) * right_sample_stride
    for sample in range(first, min(samples, first + samples_each)):
        factor = tl.load(factors + sample)
        if factor != 0:
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, positions, DEPTH):
                position = start + tl.arange(0, DEPTH)
                a = tl.load(
                    left + position[None, :] * left_position_stride + row[:, None],
                    mask=(row[:, None] < rows) & (position[None, :] < positions),
                    other=0.0,
                )
                b = tl.load(
                    right + position[:, None] * right_position_stride + column[None, :],
                    mask=(column[None, :] < columns) & (position[:, None] < positions),
                    other=0.0,
                )
                product = tl.dot(a, b, product)
            total += factor * product
        left += left_sample_stride
        right += right_sample_stride
    start = part.to(tl.int64) * rows * columns
    target = out + start + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(target, total, mask=(row[:, None] < rows) & (column[None, :] < columns))
