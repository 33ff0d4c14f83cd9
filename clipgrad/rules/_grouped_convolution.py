"""Per-sample weight gradients by one convolution whose groups are samples.

An operation of its own where a graph is traced: left open, a compiler lays the folded images out channels last, as is
right for ordinary convolutions; for groups by the hundred that is two to three times as slow, copies included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def per_sample_weight_gradient(
    gradient: Tensor,
    input: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``[B, *shape]`` of the output gradient and the input of a convolution.

    Args:
        gradient: ``[B, C_out, *spatial]``.
        input: ``[B, C_in, *spatial]``, of the same dtype.
        shape: Of the weight.
        stride: This and the others as the convolution has them.
        padding: One entry for each spatial axis, like the others.
        dilation: See above.
        transposed: Whether the convolution is.
        output_padding: See above.
        groups: Of the convolution itself.
    """
    whole = gradient.device.type == "cpu" and get_proxy_mode() is not None
    found: Tensor = (_operation if whole else _compute)(
        gradient,
        input,
        list(shape),
        list(stride),
        list(padding),
        list(dilation),
        transposed,
        list(output_padding),
        groups,
    )
    return found


def _compute(
    gradient: Tensor,
    input: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    samples = input.shape[0]

    def fold(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, samples * tensor.shape[1], *tensor.shape[2:])

    # Only the shape of the weight is read.
    weight = input.new_empty(samples * shape[0], *shape[1:])
    found: Tensor = torch.ops.aten.convolution_backward(
        fold(gradient), fold(input), weight, None, stride, padding, dilation, transposed, output_padding,
        samples * groups, (False, True, False),
    )[1]  # fmt: skip
    return found.contiguous().view(samples, *shape)


_operation = torch.library.custom_op(
    "clipgrad::per_sample_weight_gradient", _compute, mutates_args=()
)


@_operation.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    return input.new_empty(input.shape[0], *shape)
