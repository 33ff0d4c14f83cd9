"""Products of half-precision factors with float32 sums, without widening the factors first.

A product of two bfloat16 or two float16 numbers has at most 22 binary digits, so float32 holds it exactly. Tensor cores
multiply half precision and add in float32. So the result is that of widening the factors first, up to the order of
additions, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.kernels import float32_precision

HALF = (torch.float16, torch.bfloat16)
# On CUDA PyTorch multiplies half precision with float32 results; elsewhere, and on ROCm, factors are widened.
_ON_CUDA = torch.version.hip is None
_ON_EVERY_DEVICE = False  # tests set this
# A product reads rows fast that start at multiples of this many bytes.
_ALIGNMENT = 16


def _serves(tensor: Tensor) -> bool:
    return (tensor.is_cuda and _ON_CUDA) or _ON_EVERY_DEVICE


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Return whether two factors are of one half-precision dtype, on a device that multiplies them without widening."""
    return a.dtype is b.dtype and a.dtype in HALF and _serves(a)


def missing_to_alignment(elements: int, like: Tensor) -> int:
    """Return how many zeros have to follow rows of so many elements, so that a product reads them fast.

    Args:
        elements: Of one row of a factor.
        like: A tensor with the factor's device and dtype.
    """
    if not _serves(like):
        return 0
    return -elements % max(1, _ALIGNMENT // like.element_size())


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)``; in float32 if both factors are of one half-precision dtype."""
    if a.dtype is not b.dtype or a.dtype not in HALF:
        return torch.bmm(a, b)
    if not multiplies(a, b):
        return torch.bmm(a.float(), b.float())
    return sum_of_products([a], [b])


def product_for_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return ``product(a, b)`` for a clipped sum; on the CPU in full float32, since the norm is."""
    rounds = float32_precision.sum_rounds(a)
    return float32_precision.full_product(a, b) if rounds else product(a, b)


def _half_product(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_cuda:
        return torch.bmm(a.float(), b.float())
    with _sums_in_float32(a.dtype):
        return torch.bmm(a, b, out_dtype=torch.float32)


def sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """Return the float32 sum of products of half-precision factors, ``[B, N, K]`` and ``[B, K, M]``.

    Each product after the first is added in place, so that it is not written to memory of its own.
    """
    if get_proxy_mode() is None:
        return _sum_of_products(lefts, rights)
    found: Tensor = half_products(list(lefts), list(rights))
    return found


def _sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    found = _half_product(lefts[0], rights[0])
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        if left.is_cuda:
            with _sums_in_float32(left.dtype):
                torch.baddbmm(found, left, right, out_dtype=torch.float32, out=found)
        else:
            found.baddbmm_(left.float(), right.float())
    return found


# A custom operation keeps the setting for sums inside one node of a traced graph.
@torch.library.custom_op("clipgrad::half_products", mutates_args=())
def half_products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """Run ``sum_of_products`` as one node of a graph."""
    return _sum_of_products(lefts, rights)


@half_products.register_fake
def _(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    shape = *lefts[0].shape[:2], rights[0].shape[2]
    return lefts[0].new_empty(shape, dtype=torch.float32)


def terms_of_scaled_factors() -> int:
    """Return the number of bfloat16 terms of a factor that is scaled before a clipped sum: two, or one.

    These are the meanings of ``torch.set_float32_matmul_precision``. ``"medium"`` rounds float32 factors of a product
    to bfloat16, and ``"high"`` takes them as the sum of two bfloat16 numbers. ``"highest"`` has two terms here as well.
    """
    return 1 if float32_precision.allows_bfloat16() else 2


def in_terms(wide: Tensor, count: int) -> list[Tensor]:
    """Return ``count`` bfloat16 tensors whose sum is the float32 tensor, up to ``2^(-8 count)`` of each element."""
    terms = []
    for _ in range(count):
        terms.append(wide.bfloat16())
        wide = wide - terms[-1].float()
    return terms


@contextmanager
def _sums_in_float32(dtype: torch.dtype) -> Iterator[None]:
    """Forbid float16 sums inside of float16 products, which a process may allow for its own products."""
    if dtype is not torch.float16:
        yield
        return
    matmul = torch.backends.cuda.matmul
    with float32_precision.settings_lock:
        before = matmul.allow_fp16_accumulation
        try:
            matmul.allow_fp16_accumulation = False
            yield
        finally:
            matmul.allow_fp16_accumulation = before
