"""The weight gradient of one use of a convolution, for every sample: patches and products, or the library's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules._canonical import Outer, scale_rows, select_rows, widen
from clipgrad.rules._geometry import Geometry
from clipgrad.rules._grouped_convolution import grouped_gradient
from clipgrad.rules._tensor_cores import convolution_product

# Patches (the unfolded input) of more elements than this are not built at once: 512 MiB of float32.
_PATCHES_AT_ONCE = 1 << 27
# On CPU, the library's own grouped convolution does without them from half of that on. On a GPU it would run a kernel
# for each group, that is for each sample.
_PATCH_ELEMENTS = 1 << 26
# On CPU, unfolding wins over a grouped convolution while a patch is this small (a first layer), and again when
# the weight is this large; in between the grouped convolution is up to 1.7x faster. See docs/performance.md.
_SMALL_PATCH = 64
_LARGE_WEIGHT = 1 << 17
# Filters of one channel and fewer taps than this are left to the library's own depthwise kernels on CUDA.
_LONG_FILTER = 32


@dataclass(frozen=True)
class ConvolutionUse:
    """One use of a convolution's weight.

    Attributes:
        input: ``[B, C_in, *spatial]``.
        gradient: Output gradient ``[B, C_out, *spatial]``.
        weight: The shared weight; read for its shape and dtype.
        geometry: Static arguments.
    """

    input: Tensor
    gradient: Tensor
    weight: Tensor
    geometry: Geometry

    def outer(self) -> Outer:
        """Rows meet patches: ``left`` is one row vector per position, ``right`` the patch it saw.

        In a transposed convolution input and output change places.
        """
        groups, axes = self.geometry.groups, len(self.geometry.stride)
        rows, image = self.gradient, self.input
        if self.geometry.transposed:
            rows, image = image, rows
        samples, channels = rows.shape[:2]
        left = rows.reshape(samples * groups, channels // groups, -1).transpose(1, 2)
        patches = _patches(image, self.weight.shape[-axes:], rows.shape[2:], self.geometry)
        right = patches.reshape(samples * groups, -1, left.shape[1]).transpose(1, 2)
        return Outer(left, right, self.weight.shape, groups)

    def per_sample(self) -> Tensor:
        """``[B, *weight.shape]``: patches and one batched product, or one grouped convolution."""
        if self.weight.shape[1] == 1 and self.geometry.groups > 1:
            on_cpu, taps = self.input.device.type == "cpu", self.weight[0, 0].numel()
            return self._depthwise() if on_cpu or taps >= _LONG_FILTER else self._grouped()
        if not self._unfolds():
            return self._grouped()
        samples = self.input.shape[0]
        parts = min(samples, ceil(self._patch_elements() / _PATCHES_AT_ONCE))
        size = ceil(samples / parts)
        products = [
            self._rows(start, start + size).outer().per_sample(convolution_product)
            for start in range(0, samples, size)
        ]
        return products[0] if len(products) == 1 else torch.cat(products)

    def _rows(self, start: int, stop: int) -> ConvolutionUse:
        return replace(self, input=self.input[start:stop], gradient=self.gradient[start:stop])

    def _patch_elements(self) -> int:
        image, rows = (
            (self.gradient, self.input) if self.geometry.transposed else (self.input, self.gradient)
        )
        axes = len(self.geometry.stride)
        return (
            image.shape[0] * image.shape[1] * prod(self.weight.shape[-axes:]) * prod(rows.shape[2:])
        )

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The library's own weight gradient, with the factors on the smaller operand."""
        gradient, input = widen(self.gradient), widen(self.input)
        if input[:1].numel() < gradient[:1].numel():
            input = scale_rows(input, factors)
        else:
            gradient = scale_rows(gradient, factors)
        return self.geometry.weight_gradient(
            gradient, input, widen(self.weight), self.geometry.groups
        )

    def select(self, keep: Tensor) -> ConvolutionUse:
        """The same use without the samples outside the mask."""
        return replace(
            self, input=select_rows(self.input, keep), gradient=select_rows(self.gradient, keep)
        )

    def _unfolds(self) -> bool:
        if self.input.device.type != "cpu":
            return True
        if self._patch_elements() > _PATCH_ELEMENTS:
            return False
        kernel = prod(self.weight.shape[-len(self.geometry.stride) :])
        if kernel == 1:
            return True  # patches are a view of the image, or every stride-th pixel of it
        patch = self.weight.shape[1] * kernel
        return patch <= _SMALL_PATCH or self.weight.numel() >= _LARGE_WEIGHT

    def _depthwise(self) -> Tensor:
        """Filters with one channel each: the output gradient convolved over the image, stride and dilation exchanged.

        Every channel of every sample becomes a group of one forward convolution.
        """
        rows, image = self.gradient, self.input
        if self.geometry.transposed:
            rows, image = image, rows
        samples = image.shape[0]
        image, rows = widen(image), widen(rows)
        exchanged = replace(
            self.geometry,
            stride=self.geometry.dilation,
            dilation=self.geometry.stride,
            groups=samples * self.geometry.groups,
            transposed=False,
        )
        gradient = exchanged.convolve(
            image.reshape(1, -1, *image.shape[2:]), rows.reshape(-1, 1, *rows.shape[2:]), None
        )
        for axis, size in enumerate(self.weight.shape[2:], start=2):
            gradient = gradient.narrow(
                axis, 0, size
            )  # a stride may leave pixels that no output saw
        return gradient.reshape(samples, *self.weight.shape)

    def _grouped(self) -> Tensor:
        """Samples as groups of one big convolution."""
        return grouped_gradient(
            widen(self.gradient), widen(self.input), self.weight.shape, self.geometry
        )


def _patches(
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
