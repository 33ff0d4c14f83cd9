"""This module unfolds the image of a convolution into one patch per position of the filter."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad._functorch import expected, is_symbol
from clipgrad.kernels.delayed import delay_until
from clipgrad.rules.canonical import Outer
from clipgrad.rules.convolution.geometry import Geometry

# Largest number of elements of patches built at once: 512 MiB of float32, or 8 MiB on CPU, which is as fast there.
_AT_ONCE = {"cuda": 1 << 27, "cpu": 1 << 21}
# Fewer samples at a time do not use all CPU cores.
_FEWEST_AT_ONCE = 4


def rows_and_patches(
    gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry
) -> Outer:
    """Return the factors: ``left`` is one row vector per position, and ``right`` is the patch at that position."""
    groups, axes = geometry.groups, len(geometry.stride)
    rows, image = rows_and_image(gradient, input, geometry)
    if prod(shape[2:]) > 1:  # otherwise patches are a view of the image
        image = delay_until(gradient, image)
    samples, channels = rows.shape[:2]
    left = rows.reshape(samples * groups, channels // groups, -1).transpose(1, 2)
    patches = unfold(image, shape[-axes:], rows.shape[2:], geometry)
    right = patches.reshape(samples * groups, -1, left.shape[1]).transpose(1, 2)
    return Outer(left, right, shape, groups)


def linear_factors(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Outer:
    """Return ``rows_and_patches`` of one group, with the elements of each position next to each other in memory."""
    axes = len(geometry.stride)
    rows, image = rows_and_image(gradient, input, geometry)
    left = rows.flatten(2).transpose(1, 2).contiguous()
    patches = unfold(image, shape[-axes:], rows.shape[2:], geometry)
    positions_first = patches.movedim([*range(-axes, 0)], [*range(1, 1 + axes)])
    return Outer(left, positions_first.reshape(*left.shape[:2], -1), shape)


def rows_and_image(gradient: Tensor, input: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return rows and image; a transposed convolution exchanges input and output gradient."""
    return (input, gradient) if geometry.transposed else (gradient, input)


def unfold(
    image: Tensor, kernel: Sequence[int], positions: Sequence[int], geometry: Geometry
) -> Tensor:
    """Return a strided view ``[B, C, *kernel, *positions]`` of the image; only padding copies the image."""
    if any(geometry.padding):
        image = F.pad(image, [side for pad in reversed(geometry.padding) for side in (pad, pad)])
    reach = [
        (count - 1) * stride + (size - 1) * dilation + 1
        for count, stride, size, dilation in zip(
            positions, geometry.stride, kernel, geometry.dilation, strict=True
        )
    ]
    missing = [max(0, need - have) for need, have in zip(reach, image.shape[2:], strict=True)]
    if any(missing):  # output_padding extends past the image
        image = F.pad(image, [side for gap in reversed(missing) for side in (0, gap)])
    batch_stride, channel_stride, *spatial = image.stride()
    return image.as_strided(
        (*image.shape[:2], *kernel, *positions),
        (
            batch_stride,
            channel_stride,
            *(step * dilation for step, dilation in zip(spatial, geometry.dilation, strict=True)),
            *(step * stride for step, stride in zip(spatial, geometry.stride, strict=True)),
        ),
        image.storage_offset(),
    )


def number_of_parts(image: Tensor, copies: int) -> int:
    """Return in how many parts patches of all samples are built, with ``copies`` elements per channel of the image.

    It is for the expected number of samples, if that is a symbol.
    """
    on_cpu = image.device.type == "cpu"
    elements = max(1, image.shape[1] * copies)
    most = _AT_ONCE["cpu" if on_cpu else "cuda"] // elements
    return max(1, ceil(expected(image.shape[0]) / max(most, _FEWEST_AT_ONCE if on_cpu else 1)))


def pieces(image: Tensor, copies: int) -> list[slice]:
    """Return the samples of each part, of which all but the last have equally many; see ``number_of_parts``."""
    samples, count = image.shape[0], number_of_parts(image, copies)
    size = -(-samples // count)
    # A graph for any number of samples serves those for which no part is empty.
    if not is_symbol(samples) and samples:
        count = -(-samples // size)
    return [slice(i * size, (i + 1) * size if i + 1 < count else None) for i in range(count)]
