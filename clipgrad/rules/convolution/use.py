"""This module represents one use of a convolution's weight: per-sample gradient, factors and weighted sum."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipgrad.kernels.half_products import multiplies
from clipgrad.kernels.selection import select_rows, select_rows_reusing
from clipgrad.rules.canonical import Outer, Use
from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.gradient import per_sample_gradient
from clipgrad.rules.convolution.unfolding import linear_factors, rows_and_patches
from clipgrad.rules.operands import scale_rows, widen


def use_of(input: Tensor, gradient: Tensor, weight: Tensor, geometry: Geometry) -> Use:
    """Return the use of a convolution's weight, in the form whose weighted sum is the fastest.

    If patches do not overlap, a convolution is a linear layer with patches as its input, and these are no larger than
    the padded image. A product then sums bfloat16 factors as they are. The library's weight gradient needs float32.
    """
    in_bfloat16 = input.dtype is torch.bfloat16 and multiplies(input, gradient)
    if in_bfloat16 and geometry.groups == 1 and not geometry.overlaps(weight.shape[2:]):
        return linear_factors(gradient, input, weight.shape, geometry)
    return ConvolutionUse(input, gradient, weight, geometry)


@dataclass(frozen=True)
class ConvolutionUse:
    """This class holds one use of a convolution's weight."""

    input: Tensor  # Input, ``[B, C_in, *spatial]``
    gradient: Tensor  # Output gradient, ``[B, C_out, *spatial]``
    weight: Tensor  # The shared weight; only its shape and dtype are read
    geometry: Geometry  # Static arguments of the convolution

    def outer(self) -> Outer:
        factors = rows_and_patches(self.gradient, self.input, self.weight.shape, self.geometry)
        return replace(factors, widens_for_sum=True)

    def per_sample(self) -> Tensor:
        return per_sample_gradient(
            widen(self.gradient), widen(self.input), self.weight.shape, self.geometry
        )

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the library's own weight gradient; the factors scale the smaller operand."""
        gradient, input = widen(self.gradient), widen(self.input)
        if self._scales_input():
            input = scale_rows(input, factors)
        else:
            gradient = scale_rows(gradient, factors)
        return self.geometry.summed_weight_gradient(gradient, input, widen(self.weight))

    def select(self, keep: Tensor) -> ConvolutionUse:
        # The next step scales one operand, which a compiler fuses with its selection; the library reads the other one.
        of_input, of_gradient = select_rows, select_rows_reusing
        if not self._scales_input():
            of_input, of_gradient = of_gradient, of_input
        return replace(
            self, input=of_input(self.input, keep), gradient=of_gradient(self.gradient, keep)
        )

    def _scales_input(self) -> bool:
        return self.input[:1].numel() < self.gradient[:1].numel()
