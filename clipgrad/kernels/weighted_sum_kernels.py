"""This Triton kernel sums per-sample gradients times one factor per sample, and skips samples of factor zero."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def weighted_sum(
    rows, factors, out, samples, size, sample_stride, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Write ``sum_b factors[b] * rows[b]`` of one block of elements, in float32.

    The loads of ``GROUP`` samples do not wait for each other.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    start = samples * 0  # an integer for the compiler, which a loop may change
    while start < samples:
        for step in tl.static_range(GROUP):
            sample = start + step
            factor = tl.load(factors + sample, mask=sample < samples, other=0.0)
            place = rows + sample.to(tl.int64) * sample_stride + element
            # ``0 * inf`` would be NaN, so samples of factor zero are left out.
            row = tl.load(place, mask=element < tl.where(factor != 0.0, size, 0), other=0.0)
            total += factor * row.to(tl.float32)
        start += GROUP
    tl.store(out + element, total, mask=element < size)
