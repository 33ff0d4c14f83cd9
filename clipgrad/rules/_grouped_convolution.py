"""Per-sample weight gradients by one convolution whose groups are samples.

An operation of its own where a graph is traced: left open, a compiler lays the folded images out channels last, as is
right for ordinary convolutions; for groups by the hundred that is two to three times as slow, copies included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.rules._geometry import Geometry


def grouped_gradient(
    gradient: Tensor, input: Tensor, shape: Sequence[int], geometry: Geometry
) -> Tensor:
    """``[B, *shape]`` of the output gradient and the input of a convolution.

    Args:
        gradient: ``[B, C_out, *spatial]``.
        input: ``[B, C_in, *spatial]``, of the same dtype.
        shape: Of the weight.
        geometry: Of the convolution.
    """
    whole = gradient.device.type == "cpu" and get_proxy_mode() is not None
    found: Tensor = (_operation if whole else _compute)(
        gradient, input, shape, geometry.stride, geometry.padding, geometry.dilation, geometry.groups,
        geometry.transposed, geometry.output_padding,
    )  # fmt: skip
    return found


def _compute(
    gradient: Tensor,
    input: Tensor,
    shape: Sequence[int],
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
    samples = input.shape[0]

    def fold(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, samples * tensor.shape[1], *tensor.shape[2:])

    weight = input.new_empty(samples * shape[0], *shape[1:])  # only its shape is read
    found = geometry.weight_gradient(fold(gradient), fold(input), weight, samples * groups)
    return found.contiguous().view(samples, *shape)


_operation = torch.library.custom_op(
    "clipgrad::per_sample_weight_gradient", _compute, mutates_args=()
)


@_operation.register_fake
def _(gradient: Tensor, input: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    return input.new_empty(input.shape[0], *shape)
