"""Per-sample weight gradients of an image's convolution by one batched product for each tap, without patches.

With both operands channels last and the output gradient as wide as the padded image, the pixels that a tap meets are
the output's pixels moved by a constant number of places: the same matrix from another row on. So a product for each tap
reads the image where it lies, which as patches would be written and read nine times over for a 3x3 filter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad.rules._geometry import Geometry
from clipgrad.rules._tensor_cores import convolutions_may, tf32

# Channels on either side from which on products fill a tile of a GPU's.
_FEWEST_CHANNELS = 16
_MOST_TAPS = 25


def takes(geometry: Geometry, weight: Tensor) -> bool:
    """Whether a convolution's gradient can be found, and is found well, in this way."""
    rows, columns, *taps = weight.shape
    return (
        len(geometry.stride) == 2
        and not geometry.transposed
        and geometry.groups == 1
        and set(geometry.stride) == {1}
        and min(rows, columns) >= _FEWEST_CHANNELS
        and taps[0] * taps[1] <= _MOST_TAPS
    )


def tap_gradient(
    gradient: Tensor, input: Tensor, shape: Sequence[int], geometry: Geometry
) -> Tensor:
    """``[B, *shape]`` of the output gradient and the input of a convolution that :func:`takes` accepts.

    Args:
        gradient: ``[B, C_out, height, width]``.
        input: ``[B, C_in, height, width]``, of the same dtype.
        shape: Of the weight.
        geometry: Of the convolution.
    """
    (top, left), (down, right) = geometry.padding, geometry.dilation
    width = input.shape[3] + 2 * left
    # One more row than the padding's: the last taps read a little further than the image, beside zeros.
    image = F.pad(input.permute(0, 2, 3, 1), (0, 0, left, left, top, top + 1))
    rows = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, width - gradient.shape[3]))
    offsets = [i * down * width + j * right for i in range(shape[2]) for j in range(shape[3])]
    run = _products if get_proxy_mode() is None else _operation
    found: Tensor = run(
        rows.flatten(1, 2).contiguous(),
        image.flatten(1, 2).contiguous(),
        offsets,
        convolutions_may(),
    )
    samples, _, channels, columns = found.shape
    by_tap = found.view(samples, *shape[2:], channels, columns)
    return by_tap.permute(0, 3, 4, 1, 2)


def _products(rows: Tensor, image: Tensor, offsets: Sequence[int], allowed: bool) -> Tensor:
    """``[B, taps, C_out, C_in]`` of ``rows`` ``[B, P, C_out]`` and ``image`` ``[B, P + more, C_in]``."""
    samples, positions, channels = rows.shape
    found = image.new_empty(samples, len(offsets), channels, image.shape[2])
    across = rows.transpose(1, 2)
    with tf32(allowed):
        for tap, offset in enumerate(offsets):
            torch.bmm(across, image[:, offset : offset + positions], out=found[:, tap])
    return found


# An operation of its own where a graph is traced: a compiler would write each product first, and then copy all of them.
_operation = torch.library.custom_op(
    "clipgrad::tap_products", _products, mutates_args=(), tags=(torch.Tag.needs_exact_strides,)
)


@_operation.register_fake
def _(rows: Tensor, image: Tensor, offsets: Sequence[int], allowed: bool) -> Tensor:
    return image.new_empty(image.shape[0], len(offsets), rows.shape[2], image.shape[2])
