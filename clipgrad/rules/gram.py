"""This module finds squared norms of sums of outer products, and the lengths that bound their rounding error.

For one sample with factors ``left [S, rows]`` and ``right [S, columns]`` the gradient ``left^T right`` has the squared
norm ``sum_st (left_s . left_t) (right_s . right_t)``, the sum of an elementwise product of two Gram matrices. Their
diagonals hold the squared lengths of all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad._functorch import expected
from clipgrad.kernels.float32_precision import FULL, full_product, rounds, set_precision
from clipgrad.kernels.half_products import HALF, product
from clipgrad.kernels.launcher import launcher

# This limit on the elements of one block's Gram matrices keeps a ghost norm's scratch memory below about 256 MiB.
_ELEMENTS = 1 << 25
# With fewer positions, half-size blocks are so small that using the symmetry of a Gram matrix is not faster.
_SYMMETRY_POSITIONS = 256
_BY_KERNEL = {torch.float32, *HALF}
_KERNEL_DEVICES = {"cuda"}
# Tensor cores cut digits off a sum of half-precision products. For rows of one sign an H200 lost 3.5e-9 of the sum per
# element, which is 1.8e-4 for a vocabulary of 50257. So longer sums are added up from pieces in float32.
_LONGEST_HALF_PRODUCT = 512


@dataclass(frozen=True)
class Lengths:
    """This class holds sums of lengths over the positions of a sample, each ``[B]``."""

    left: Tensor  # ``sum_s |left_s|``
    right: Tensor  # ``sum_s |right_s|``
    products: Tensor  # ``sum_s |left_s| |right_s|``, the norm of the gradient if no terms cancelled

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Lengths:
        """Build the sums from the length of each position, ``[B, S]``."""
        return cls(left.sum(1), right.sum(1), (left * right).sum(1))

    @classmethod
    def total(cls, parts: Sequence[Lengths]) -> Lengths:
        """Add the sums of one or more pairs of factors."""
        return sum(parts[1:], start=parts[0])

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def gram_sums(left: Tensor, right: Tensor) -> tuple[Tensor, Lengths]:
    """Return squared norms ``[B]`` of ``sum_s left_s (outer product) right_s``, and the lengths of its positions.

    Products never use TF32 or bfloat16: where terms cancel, a norm needs the digits that these drop. Products of
    half-precision numbers are exact in float32.

    The factors are ``[B, S, rows]`` and ``[B, S, columns]``; with half precision of either the result is float32.
    """
    if left.device.type in _KERNEL_DEVICES and {left.dtype, right.dtype} <= _BY_KERNEL:
        return _added(_as_operation(left, right))
    left, right = (factor.float() if factor.dtype in HALF else factor for factor in (left, right))
    if get_proxy_mode() is not None and rounds(left):
        return _added(_as_operation(left, right))
    with set_precision(left.device.type, FULL):
        norms, *lengths = _by_products(left, right)
    return norms, Lengths(*lengths)


def _added(parts: Tensor) -> tuple[Tensor, Lengths]:
    """Add parts ``[4, B, parts]``, each quantity apart: a compiler joins such sums with what uses them."""
    norms, *lengths = (quantity.sum(1) for quantity in parts.unbind())
    return norms, Lengths(*lengths)


def equal_id_sums(ids: Tensor, right: Tensor) -> tuple[Tensor, Lengths]:
    """Return ``gram_sums`` for one-hot rows with ids ``[B, S]``, whose inner products are 1 if equal and else 0."""
    gram = full_product(right, right.transpose(1, 2))
    equal = ids[:, :, None] == ids[:, None, :]
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    return gram.where(equal, 0.0).sum((1, 2)), Lengths.of(torch.ones_like(length), length)


def _by_products(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = left.shape[1]
    if expected(positions) >= _SYMMETRY_POSITIONS:
        # By symmetry two half-size norms and one off-diagonal block, counted twice, are enough.
        half = positions // 2
        heads, tails = (left[:, :half], right[:, :half]), (left[:, half:], right[:, half:])
        first, second = _by_products(*heads), _by_products(*tails)
        crossing = 2 * _in_pieces(_product, *heads, *tails)[0]
        norms, *lengths = (a + b for a, b in zip(first, second, strict=True))
        return (norms + crossing, *lengths)  # type: ignore[return-value]
    return _in_pieces(_product_and_lengths, left, right, left, right)  # type: ignore[return-value]


def _in_pieces(function: Callable[..., tuple[Tensor, ...]], *factors: Tensor) -> tuple[Tensor, ...]:
    """Apply the function to a few samples at a time, so that their Gram matrices stay small."""
    samples = factors[0].shape[0]
    elements = expected(factors[0].shape[1] * factors[-1].shape[1])
    if samples * elements <= _ELEMENTS:
        return function(*factors)
    step = max(1, _ELEMENTS // max(1, elements))
    starts = range(0, samples, step)
    pieces = [function(*(factor[start : start + step] for factor in factors)) for start in starts]
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


def _product(
    left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor
) -> tuple[Tensor, ...]:
    """Return ``sum_st (left_s . other_left_t) (right_s . other_right_t)`` per sample."""
    first, second = _inner_products(left, other_left), _inner_products(right, other_right)
    return (torch.linalg.vecdot(first.flatten(1), second.flatten(1)),)


def _product_and_lengths(left: Tensor, right: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    first, second = _inner_products(left, left), _inner_products(right, right)
    total = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    lengths = Lengths.of(*(gram.diagonal(dim1=1, dim2=2).sqrt() for gram in (first, second)))
    return total, lengths.left, lengths.right, lengths.products


def _inner_products(rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``rows @ columns^T`` per sample, ``[B, S, T]``, of factors ``[B, S, width]`` and ``[B, T, width]``."""
    if rows.dtype not in HALF or rows.shape[2] <= _LONGEST_HALF_PRODUCT:
        return product(rows, columns.transpose(1, 2))
    pieces = zip(
        *(factor.split(_LONGEST_HALF_PRODUCT, 2) for factor in (rows, columns)), strict=True
    )
    first, *others = (product(a, b.transpose(1, 2)) for a, b in pieces)
    return sum(others, start=first)


# A custom operation keeps the setting of precision and the kernel inside one node of a traced graph. Parts are added
# outside, where the compiler joins the sum with what uses it.
@torch.library.custom_op("clipgrad::gram_sums", mutates_args=())
def _as_operation(left: Tensor, right: Tensor) -> Tensor:
    """Return parts of norms and lengths, ``[4, B, parts]``, from clipgrad's Triton kernel where it is usable."""
    return _parts([left], right)[0]


@torch.library.custom_op("clipgrad::gram_sums_of_several", mutates_args=())
def of_several(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    """Return ``gram_sums`` of several left factors with one right factor, ``[len(lefts), 4, B, parts]``."""
    return _parts(lefts, right)


def _parts(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    launch = launcher("gram_launch") if right.is_cuda else None
    if launch is not None and (found := launch.gram_sums(lefts, right)) is not None:
        return found  # type: ignore[no-any-return]
    with set_precision(right.device.type, FULL):
        whole = torch.stack([torch.stack(_by_products(left, right)) for left in lefts])
    others = whole.new_zeros(*whole.shape, _number_of_parts(right) - 1)
    return torch.cat([whole.unsqueeze(3), others], 3)


@_as_operation.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return _empty_parts(right)


@of_several.register_fake
def _(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    return _empty_parts(right, len(lefts))


def _empty_parts(right: Tensor, *before: int) -> Tensor:
    samples = right.shape[0]  # ``len`` would make a number of a symbol
    shape = *before, 4, samples, _number_of_parts(right)
    return right.new_empty(shape, dtype=torch.promote_types(right.dtype, torch.float32))


def _number_of_parts(factor: Tensor) -> int:
    launch = launcher("gram_launch") if factor.is_cuda else None
    return 1 if launch is None else launch.number_of_parts(factor.shape[1])
