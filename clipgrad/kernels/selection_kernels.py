"""This Triton kernel writes zeros to dropped samples and returns immediately for kept samples."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def zero_rows(values, keep, size, sample_stride, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(keep + sample) == 0:
        for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            tl.store(values + sample * sample_stride + offsets, 0.0, mask=offsets < size)
