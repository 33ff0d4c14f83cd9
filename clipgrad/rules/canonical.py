"""This module defines one canonical layout for the gradient of a parameter use, and its three operations.

A weight that is multiplied with an activation has, for sample ``b``, the gradient

    g_b = sum_s  left[b, s] (outer product) right[b, s]            [rows, columns]

where ``s`` runs over the positions at which the sample uses the weight (time steps, pixels), ``left`` indexes the rows
of the parameter and ``right`` its columns. A linear layer has ``left`` = output gradient and ``right`` = input; an
embedding has ``left`` = one-hot of the ids. The two factors give

* the per-sample gradient                  ``left^T right``
* its squared norm without building it     ``sum_st (left_s . left_t) (right_s . right_t)``   (ghost norm)
* the weighted sum over samples            one GEMM over samples and positions together

References: Goodfellow 2015 (arXiv:1510.01799) for one position; Li et al. 2022 (arXiv:2110.05679) for many;
Bu et al. 2023 (arXiv:2210.00038) for keeping the factors of one backward pass ("book-keeping").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.kernels.float32_precision import full_combination, full_product, sum_rounds
from clipgrad.kernels.half_products import (
    HALF,
    in_terms,
    missing_to_alignment,
    multiplies,
    product,
    product_for_sum,
    sum_of_products,
    terms_of_scaled_factors,
)
from clipgrad.kernels.selection import select_rows, select_rows_reusing
from clipgrad.kernels.weighted_sum import sums_rows, weighted_sum
from clipgrad.rules.one_hot import OneHot
from clipgrad.rules.operands import in_memory_order, scale_rows, widen

BatchedProduct = Callable[[Tensor, Tensor], Tensor]


def weighted_sum_of(uses: Sequence[Use], factors: Tensor) -> Tensor:
    """Return ``sum_b factors[b] * g_b`` of one or more uses of a parameter.

    An embedding that is tied to the output layer has uses that touch a few rows. They are added to the sum of the
    others in place, since a sum of its own would be as large as the embedding.
    """
    total: Tensor | None = None
    for use in sorted(uses, key=adds_rows):
        if total is not None and adds_rows(use):
            use.add_rows_to(total, factors)
        else:
            found = use.weighted_sum(factors)
            total = found if total is None else total + found
    assert total is not None, "a weighted sum of no uses"
    return total


def adds_rows(use: Use) -> TypeGuard[Outer]:
    """Return whether a use adds to a few rows of its parameter, as an embedding does."""
    return isinstance(use, Outer) and isinstance(use.left, OneHot)


@runtime_checkable
class Use(Protocol):
    """This protocol represents the gradient of one use of one parameter, for every sample of the microbatch."""

    def per_sample(self) -> Tensor:
        """Return the per-sample gradients, ``[B, *parameter.shape]``."""
        ...

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return ``sum_b factors[b] * g_b``, shape ``parameter.shape``; ``factors`` is ``[B]``, zero if dropped."""
        ...

    def outer(self) -> Outer | None:
        """Return the canonical factors, or None if this use has none (then its gradient is always kept)."""
        ...

    def select(self, keep: Tensor) -> Use:
        """Return this use with exactly zero gradients for all samples outside the boolean mask ``keep``."""
        ...


@dataclass(frozen=True)
class PerSample:
    """This class holds a use whose per-sample gradient is already computed (biases, norm layers).

    Attributes:
        gradient: ``[B, *parameter.shape]``.
    """

    gradient: Tensor

    def per_sample(self) -> Tensor:
        return self.gradient

    def weighted_sum(self, factors: Tensor) -> Tensor:
        gradient = self.gradient
        if sums_rows(gradient):
            return _over_rows(gradient, lambda rows: weighted_sum(rows, factors))
        if get_proxy_mode() is not None:
            # A compiler fuses this sum with the operations before it, in any layout; it does not fuse a matrix product.
            return scale_rows(widen(gradient), factors).sum(0)
        if gradient.dtype is torch.bfloat16 and multiplies(gradient, gradient):
            # Three terms hold all digits of the factors, and the gradients are not widened.
            terms = torch.stack(in_terms(factors, 3))[None]
            totals = product(terms, gradient.reshape(1, gradient.shape[0], -1))[0]
            return totals.sum(0).view(gradient.shape[1:])
        wide = widen(gradient)
        if wide.dim() == 1:
            return factors.to(wide.dtype) @ wide
        return _over_rows(wide, lambda rows: full_combination(factors.to(rows.dtype), rows))

    def outer(self) -> Outer | None:
        return None

    def select(self, keep: Tensor) -> PerSample:
        # Such a sum leaves dropped samples out, since their factor is zero.
        if sums_rows(self.gradient):
            return self
        return PerSample(select_rows(self.gradient, keep))


def _over_rows(gradient: Tensor, sum_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a sum over samples ``[*shape]`` of gradients ``[B, *shape]``, read in the order of their memory.

    Args:
        gradient: Of every sample.
        sum_rows: Sums rows ``[B, N]`` to ``[N]``.
    """
    ordered, axes = in_memory_order(gradient)
    total = sum_rows(ordered.flatten(1)).view(ordered.shape[1:])
    return total.permute([axes.index(axis) for axis in range(1, gradient.dim())])


@dataclass(frozen=True)
class Outer:
    """This class holds, for every sample, a sum over positions of outer products; see the module's docstring.

    Attributes:
        left: ``[B * groups, S, rows / groups]``, or a ``OneHot`` of that shape (then ``groups`` is 1).
        right: ``[B * groups, S, columns]``.
        shape: The parameter's shape, with ``rows * columns`` elements, rows first.
        groups: Number of blocks of rows with separate factors (grouped convolutions).
        zeros: Number of zeros behind the rows of each position in ``left``, and behind its columns in ``right``.
        widens_for_sum: Whether the weighted sum is left to an operation that reads the factors in float32.
    """

    left: Tensor | OneHot
    right: Tensor
    shape: torch.Size
    groups: int = 1
    zeros: tuple[int, int] = (0, 0)
    widens_for_sum: bool = False

    @property
    def samples(self) -> int:
        return self.right.shape[0] // self.groups

    @property
    def columns(self) -> int:
        return self.right.shape[-1] - self.zeros[1]

    def aligned(self) -> Outer:
        """Return this use with zeros behind the elements of each position, if a product then reads them faster.

        A vocabulary of 50257 ids would take a GPU two to five times as long. The zeros contribute nothing.
        """
        if isinstance(self.left, OneHot) or self.groups > 1:
            return self
        factors = self.left, self.right
        missing = [missing_to_alignment(factor.shape[-1], factor) for factor in factors]
        if not any(missing):
            return self
        left, right = (
            F.pad(factor, (0, behind)) if behind else factor
            for factor, behind in zip(factors, missing, strict=True)
        )
        zeros = self.zeros[0] + missing[0], self.zeros[1] + missing[1]
        return replace(self, left=left, right=right, zeros=zeros)

    def trimmed(self) -> Outer:
        """Return this use without the zeros of ``aligned``."""
        if not any(self.zeros):
            return self
        assert isinstance(self.left, Tensor)
        left = self.left[..., : self.left.shape[-1] - self.zeros[0]]
        return replace(self, left=left, right=self.right[..., : self.columns], zeros=(0, 0))

    @property
    def stays_half(self) -> bool:
        """Return whether products read the factors in half precision, as they are."""
        return isinstance(self.left, Tensor) and multiplies(self.left, self.right)

    def outer(self) -> Outer:
        return self

    def per_sample(self, batched_product: BatchedProduct = product) -> Tensor:
        if isinstance(self.left, OneHot):
            rows = self.left.per_sample(widen(self.right))
            return rows.view(self.samples, *self.shape)
        if self.left.shape[1] == 1:  # a broadcast product is faster than bmm with one position
            found = widen(self.left).transpose(1, 2) * widen(self.right)
        elif self.stays_half:
            found = batched_product(self.left.transpose(1, 2), self.right)
        else:
            found = batched_product(widen(self.left).transpose(1, 2), widen(self.right))
        return self._shaped(found, self.samples)

    def stored(self) -> Tensor:
        """Return per-sample gradients as they are kept until they are summed.

        If a device multiplies bfloat16 factors, the product is rounded to bfloat16, as ordinary autograd rounds the
        gradient of a weight. Norms are then those of the rounded gradients, which are summed in float32.
        """
        if not self.sums_in_bfloat16 or self.right.shape[1] == 1:
            return self.per_sample()
        assert isinstance(self.left, Tensor)
        found = torch.bmm(self.left.transpose(1, 2), self.right)
        return self._shaped(found, self.samples)

    def _shaped(self, product: Tensor, gradients: int) -> Tensor:
        if any(self.zeros):
            product = product[:, : product.shape[1] - self.zeros[0], : self.columns]
        return product.reshape(gradients, *self.shape)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        if self.groups > 1:
            return PerSample(self.per_sample(product_for_sum)).weighted_sum(factors)
        if isinstance(self.left, OneHot):
            total = widen(self.right[:0]).new_zeros(self.left.width, self.columns)
            return self.add_rows_to(total, factors).view(self.shape)
        scales_left = self._scales_left(self.left)
        scaled, other = (self.left, self.right) if scales_left else (self.right, self.left)
        scaled = scale_rows(widen(scaled), factors)
        if self.sums_in_bfloat16:
            # A scaled factor has more digits than bfloat16 holds.
            terms = [(term, other) for term in in_terms(scaled, terms_of_scaled_factors())]
        else:
            terms = [(scaled, widen(other))]
        total = _over_all([pair if scales_left else pair[::-1] for pair in terms])
        return self._shaped(total, 1).view(self.shape)

    def add_rows_to(self, total: Tensor, factors: Tensor) -> Tensor:
        """Add ``weighted_sum(factors)`` to ``total`` in place; the left factor must be a ``OneHot``."""
        assert isinstance(self.left, OneHot)
        return self.left.add_to(total, scale_rows(widen(self.right), factors))

    def select(self, keep: Tensor) -> Outer:
        if self.groups > 1:
            keep = keep.repeat_interleave(self.groups)
        if isinstance(self.left, OneHot):
            return replace(self, right=select_rows(self.right, keep))
        # The next step scales one factor, which a compiler fuses with its selection; a product reads the other factor.
        of_left, of_right = select_rows, select_rows_reusing
        if not self._scales_left(self.left):
            of_left, of_right = of_right, of_left
        return replace(self, left=of_left(self.left, keep), right=of_right(self.right, keep))

    @property
    def sums_in_bfloat16(self) -> bool:
        """Return whether the weighted sum is a bfloat16 product, for which the scaled factor is split in terms."""
        in_bfloat16 = self.stays_half and self.right.dtype is torch.bfloat16
        return in_bfloat16 and self.groups == 1 and not self.widens_for_sum

    def _scales_left(self, left: Tensor) -> bool:
        """Return whether a weighted sum scales the left factor, because it is the narrower factor.

        Of factors of equal width it scales the right one: a layer's input, which other layers may share.
        """
        return left.shape[-1] < self.right.shape[-1]


def _over_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of products ``[1, rows, columns]`` of pairs of factors over the positions of all samples."""
    lefts = [left.flatten(0, 1).t()[None] for left, _ in pairs]
    rights = [right.flatten(0, 1)[None] for _, right in pairs]
    if rights[0].dtype in HALF:
        return sum_of_products(lefts, rights)
    left, right = lefts[0], rights[0]
    return full_product(left, right) if sum_rounds(left) else (left[0] @ right[0])[None]
