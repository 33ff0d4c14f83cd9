"""The unfolded image of a convolution: a patch for every place that its filter saw."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.kernels.delayed import after
from clipgrad.rules.canonical import Outer
from clipgrad.rules.convolution.geometry import Geometry

# Patches of more elements than this are not built at once: 512 MiB of float32, or 8 where that is as fast.
_AT_ONCE = {"cuda": 1 << 27, "cpu": 1 << 21}
# Fewer samples than this at a time leave cores without work.
_FEWEST_AT_ONCE = 4


def rows_and_patches(
    gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry
) -> Outer:
    """Rows meet patches: ``left`` is one row vector per position, ``right`` the patch it saw."""
    groups, axes = geometry.groups, len(geometry.stride)
    rows, image = roles(gradient, input, geometry)
    if prod(shape[2:]) > 1:  # else patches are a view of the image
        image = after(gradient, image)
    samples, channels = rows.shape[:2]
    left = rows.reshape(samples * groups, channels // groups, -1).transpose(1, 2)
    patches = unfold(image, shape[-axes:], rows.shape[2:], geometry)
    right = patches.reshape(samples * groups, -1, left.shape[1]).transpose(1, 2)
    return Outer(left, right, shape, groups)


def roles(gradient: Tensor, input: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Rows and image. In a transposed convolution input and output change places."""
    return (input, gradient) if geometry.transposed else (gradient, input)


def unfold(
    image: Tensor, kernel: Sequence[int], positions: Sequence[int], geometry: Geometry
) -> Tensor:
    """A strided view ``[B, C, *kernel, *positions]`` of the padded image; nothing is copied but the padding."""
    if any(geometry.padding):
        image = F.pad(image, [side for pad in reversed(geometry.padding) for side in (pad, pad)])
    reach = [
        (count - 1) * stride + (size - 1) * dilation + 1
        for count, stride, size, dilation in zip(
            positions, geometry.stride, kernel, geometry.dilation, strict=True
        )
    ]
    missing = [max(0, need - have) for need, have in zip(reach, image.shape[2:], strict=True)]
    if any(missing):  # output_padding reaches past the image
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


def samples_at_once(image: Tensor, copies: int) -> int:
    """Of how many samples, spread evenly, patches are built: ``copies`` for each channel of the image."""
    on_cpu, samples = image.device.type == "cpu", len(image)
    elements = max(1, image.shape[1] * copies)
    most = max(_AT_ONCE["cpu" if on_cpu else "cuda"] // elements, 1)
    parts = ceil(samples / max(most, _FEWEST_AT_ONCE if on_cpu else 1))
    return ceil(samples / max(1, parts)) or 1
