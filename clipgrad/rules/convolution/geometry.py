"""This module holds the static arguments of a convolution, and runs convolutions with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """This class holds the static arguments of a convolution, with one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the convolution by the public function, the only function that autocast covers on CPU."""
        axes = len(self.stride)
        if not self.transposed:
            plain = getattr(torch, f"conv{axes}d")
            result: Tensor = plain(
                input, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
            return result
        transposed = getattr(torch, f"conv_transpose{axes}d")
        result = transposed(
            input, weight, bias, self.stride, self.padding, self.output_padding, self.groups,
            self.dilation,
        )  # fmt: skip
        return result

    def weight_gradient(
        self, gradient: Tensor, input: Tensor, weight: Tensor, groups: int
    ) -> Tensor:
        """Return the gradient of a weight with the shape of ``weight``, computed by the library's own operation."""
        axes = len(self.stride)
        result: Tensor = torch.ops.aten.convolution_backward(
            gradient, input, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding or (0,) * axes, groups, (False, True, False),
        )[1]  # fmt: skip
        return result
