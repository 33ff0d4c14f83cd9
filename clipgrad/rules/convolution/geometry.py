"""This module holds the static arguments of a convolution, and runs convolutions with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        name = (
            f"conv_transpose{len(self.stride)}d" if self.transposed else f"conv{len(self.stride)}d"
        )
        options: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        if self.transposed:
            options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        result: Tensor = getattr(torch, name)(input, weight, bias, *options)
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
