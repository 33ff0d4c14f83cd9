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
def _loaded(
    factor, rows, elements, positions, width: tl.constexpr, position_stride, element_stride
):
    """Load these elements of these rows, which are broadcast to one shape, with zeros outside of the factor."""
    return tl.load(
        factor + rows * position_stride + elements * element_stride,
        mask=(rows < positions) & (elements < width),
        other=0.0,
    )


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
            a = _loaded(
                factor, rows[:, None], (start + element)[None, :], positions, width,
                position_stride, element_stride,
            )  # fmt: skip
            block = _added(block, a, tl.trans(a), one)
    else:
        for start in range(0, width, DEPTH):
            a = _loaded(
                factor, rows[:, None], (start + element)[None, :], positions, width,
                position_stride, element_stride,
            )  # fmt: skip
            b = _loaded(
                factor, columns[None, :], (start + element)[:, None], positions, width,
                position_stride, element_stride,
            )  # fmt: skip
            block = _added(block, a, b, one)
    return block


@triton.jit
def gram_sums(
    lefts,
    right,
    out,
    positions,
    blocks,
    left_widths: tl.constexpr,
    right_width: tl.constexpr,
    left_strides,
    right_strides,
    one,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sum one block of the upper triangle of one sample's Gram matrices; off-diagonal blocks count twice by symmetry.

    Several left factors may share the right one, as layers share their input; its Gram matrix is computed once.
    ``out[i, :, program]`` holds the block's contributions to the squared norm of left factor ``i`` with the right one,
    and to the sums of the left lengths, of the right lengths and of their products. The lengths are found on the
    diagonal. Strides are of samples, positions and elements. The first two are in units of ``UNIT`` elements, so that
    the compiler knows how they are aligned.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    block = program % blocks
    # The blocks are (0, 0), (0, 1), (1, 1), (0, 2), ...; the next lines correct the rounding error of the root.
    column = ((tl.sqrt(8.0 * block.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where((column + 1) * (column + 2) // 2 <= block, column + 1, column)
    column = tl.where(column * (column + 1) // 2 > block, column - 1, column)
    row = block - column * (column + 1) // 2
    lane = tl.arange(0, TILE)
    on_diagonal = (lane[:, None] == lane[None, :]) & (row == column)
    rights = _block_of_gram(
        right + sample * (right_strides[0] * UNIT), row, column, positions, right_width,
        right_strides[1] * UNIT, right_strides[2], one, TILE, DEPTH,
    )  # fmt: skip
    right_lengths = tl.sqrt(tl.sum(tl.where(on_diagonal, rights, 0.0), 1))
    place, programs = out + program, tl.num_programs(0).to(tl.int64)
    for i in tl.static_range(len(lefts)):
        found = _block_of_gram(
            lefts[i] + sample * (left_strides[i][0] * UNIT), row, column, positions, left_widths[i],
            left_strides[i][1] * UNIT, left_strides[i][2], one, TILE, DEPTH,
        )  # fmt: skip
        lengths = tl.sqrt(tl.sum(tl.where(on_diagonal, found, 0.0), 1))
        tl.store(place, tl.sum(found * rights) * tl.where(row == column, 1.0, 2.0))
        tl.store(place + programs, tl.sum(lengths))
        tl.store(place + 2 * programs, tl.sum(right_lengths))
        tl.store(place + 3 * programs, tl.sum(lengths * right_lengths))
        place += 4 * programs
