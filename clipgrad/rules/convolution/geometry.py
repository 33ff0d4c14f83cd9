"""This module holds the static arguments of a convolution, and runs convolutions with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.kernels.float32_precision import FULL, set_precision, sum_rounds


@dataclass(frozen=True)
class Geometry:
    """This class holds the static arguments of a convolution, with one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def overlaps(self, kernel: Sequence[int]) -> bool:
        """Return whether two positions of a kernel of this size read the same pixel."""
        axes = zip(self.stride, kernel, self.dilation, strict=True)
        return any(stride <= (size - 1) * dilation for stride, size, dilation in axes)

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

    def summed_weight_gradient(self, gradient: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return ``weight_gradient`` for a clipped sum; on the CPU in full float32, since the norm is."""
        if not sum_rounds(gradient):
            return self.weight_gradient(gradient, input, weight, self.groups)
        if get_proxy_mode() is None:
            with set_precision("cpu", FULL):
                return self.weight_gradient(gradient, input, weight, self.groups)
        found: Tensor = _full_weight_gradient(gradient, input, weight, *astuple(self))
        return found


# A custom operation keeps the setting inside one node of a traced graph.
@torch.library.custom_op("clipgrad::full_weight_gradient", mutates_args=())
def _full_weight_gradient(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    geometry = Geometry(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )
    with set_precision("cpu", FULL):
        return geometry.weight_gradient(gradient, input, weight, groups).contiguous()


@_full_weight_gradient.register_fake
def _(gradient: Tensor, input: Tensor, weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty(weight.shape)
