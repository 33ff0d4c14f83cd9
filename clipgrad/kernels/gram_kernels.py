"""This Triton kernel sums the elementwise product of two Gram matrices without writing them to memory."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def _added(block, a, b, one):
    """Add ``a @ b``, by three TF32 products or one of half precision.

    Tensor cores cut off digits when they add, which makes long sums too small. So each product starts at zero. It is
    multiplied by an unknown one, since the compiler would move a plain sum into the tensor cores.
    """
    if a.dtype == tl.float32:
        return block + tl.dot(a, b, input_precision="tf32x3") * one
    else:
        return block + tl.dot(a, b) * one


@triton.jit
def _block_of_gram(
    factor,
    row,
    column,
    positions,
    width: tl.constexpr,
    position_stride,
    element_stride,
    one,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return block ``row, column`` of ``factor @ factor^T`` in float32."""
    block = tl.zeros((TILE, TILE), tl.float32)
    element, lane = tl.arange(0, DEPTH), tl.arange(0, TILE)
    rows, columns = row * TILE + lane, column * TILE + lane
    if row == column:  # both operands are the same, and loading takes most of the time
        for start in range(0, width, DEPTH):
            inside = start + element < width
            offsets = (start + element) * element_stride
            a = tl.load(
                factor + rows[:, None] * position_stride + offsets[None, :],
                mask=(rows[:, None] < positions) & inside[None, :],
                other=0.0,
            )
            block = _added(block, a, tl.trans(a), one)
    else:
        for start in range(0, width, DEPTH):
            inside = start + element < width
            offsets = (start + element) * element_stride
            a = tl.load(
                factor + rows[:, None] * position_stride + offsets[None, :],
                mask=(rows[:, None] < positions) & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                factor + columns[None, :] * position_stride + offsets[:, None],
                mask=(columns[None, :] < positions) & inside[:, None],
                other=0.0,
            )
            block = _added(block, a, b, one)
    return block


@triton.jit
def gram_sums(
    left,
    right,
    out,
    positions,
    blocks,
    left_width: tl.constexpr,
    right_width: tl.constexpr,
    left_sample_stride,
    left_position_stride,
    left_element_stride,
    right_sample_stride,
    right_position_stride,
    right_element_stride,
    one,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sum one block of the upper triangle of one sample's Gram matrices; off-diagonal blocks count twice by symmetry.

    ``out[:, program]`` holds the block's contributions to the squared norm, and to the sums of the left lengths, of the
    right lengths and of their products. The lengths are found on the diagonal. Strides of samples and positions are in
    units of ``UNIT`` elements, so that the compiler knows how they are aligned.
    """
    left_sample_stride, left_position_stride = (
        left_sample_stride * UNIT,
        left_position_stride * UNIT,
    )
    right_sample_stride, right_position_stride = (
        right_sample_stride * UNIT,
        right_position_stride * UNIT,
    )
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    block = program % blocks
    # The blocks are (0, 0), (0, 1), (1, 1), (0, 2), ...; the next lines correct the rounding error of the root.
    column = ((tl.sqrt(8.0 * block.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where((column + 1) * (column + 2) // 2 <= block, column + 1, column)
    column = tl.where(column * (column + 1) // 2 > block, column - 1, column)
    row = block - column * (column + 1) // 2
    lefts = _block_of_gram(
        left + sample * left_sample_stride, row, column, positions, left_width,
        left_position_stride, left_element_stride, one, TILE, DEPTH,
    )  # fmt: skip
    rights = _block_of_gram(
        right + sample * right_sample_stride, row, column, positions, right_width,
        right_position_stride, right_element_stride, one, TILE, DEPTH,
    )  # fmt: skip
    lane = tl.arange(0, TILE)
    on_diagonal = (lane[:, None] == lane[None, :]) & (row == column)
    left_lengths = tl.sqrt(tl.sum(tl.where(on_diagonal, lefts, 0.0), 1))
    right_lengths = tl.sqrt(tl.sum(tl.where(on_diagonal, rights, 0.0), 1))
    place, programs = out + program, tl.num_programs(0).to(tl.int64)
    tl.store(place, tl.sum(lefts * rights) * tl.where(row == column, 1.0, 2.0))
    tl.store(place + programs, tl.sum(left_lengths))
    tl.store(place + 2 * programs, tl.sum(right_lengths))
    tl.store(place + 3 * programs, tl.sum(left_lengths * right_lengths))
