"""Convolutions of one to three axes, plain and transposed, any stride, padding, dilation and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules._canonical import Outer, PerSample, Use, scale_rows, select_rows, widen
from clipgrad.rules._registry import Call, Decline, Extent, Recipe, register_rule

# Patches (the unfolded input) of more elements than this are not built; the library's own grouped convolution
# finds per-sample weight gradients without them. 2**26 float32 values are 256 MiB.
_PATCH_ELEMENTS = 1 << 26
# On CPU, unfolding wins over a grouped convolution while a patch is this small (a first layer), and again when
# the weight is this large; in between the grouped convolution is up to 1.7x faster. See docs/performance.md.
_SMALL_PATCH = 64
_LARGE_WEIGHT = 1 << 17
# Filters of one channel and fewer taps than this are left to the library's own depthwise kernels on CUDA.
_LONG_FILTER = 32


@dataclass(frozen=True)
class Geometry:
    """The static arguments of a convolution, one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution itself, by the public function: autocast on CPU knows no other."""
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
        """The gradient of a weight shaped like ``weight``, by the library's own convolution."""
        axes = len(self.stride)
        result: Tensor = torch.ops.aten.convolution_backward(
            gradient, input, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding or (0,) * axes, groups, (False, True, False),
        )[1]  # fmt: skip
        return result


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
        return self.outer().per_sample()

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
        image, rows = (
            (self.gradient, self.input) if self.geometry.transposed else (self.input, self.gradient)
        )
        axes = len(self.geometry.stride)
        kernel = prod(self.weight.shape[-axes:])
        patch = self.weight.shape[1] * kernel
        elements = image.shape[0] * image.shape[1] * kernel * prod(rows.shape[2:])
        if elements > _PATCH_ELEMENTS:
            return False
        if kernel == 1:
            return True  # patches are a view of the image, or every stride-th pixel of it
        if image.device.type != "cpu" or patch <= _SMALL_PATCH:
            return True
        return self.weight.numel() >= _LARGE_WEIGHT

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
        samples = self.input.shape[0]

        def fold(tensor: Tensor) -> Tensor:
            return widen(tensor).reshape(1, samples * tensor.shape[1], *tensor.shape[2:])

        # Only the shape of the weight is read.
        weight = widen(self.weight)[None].expand(samples, *self.weight.shape).flatten(0, 1)
        gradient = self.geometry.weight_gradient(
            fold(self.gradient), fold(self.input), weight, samples * self.geometry.groups
        )
        return gradient.view(samples, *self.weight.shape)


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


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * axes if len(value) == 1 else tuple(value)


def _same_padding(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """``padding='same'``: symmetric where possible, the odd element padded at the end, as PyTorch does."""
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _convolve(
    call: Call, axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, **static: Any
) -> Tensor:
    if not call.has_lanes(input):
        raise Decline
    x, w = call.batched(input), call.shared(weight)
    b = None if bias is None else call.shared(bias)
    inner = x.shape[1 : x.dim() - axes - 1]  # the batch of one, or nothing
    x = x.reshape(-1, *x.shape[-axes - 1 :])
    dilation = _per_axis(static["dilation"], axes)
    padding = static["padding"]
    if padding == "same":
        if any(step != 1 for step in _per_axis(static["stride"], axes)):
            raise Decline  # PyTorch refuses it; let it say so
        x, padding = _same_padding(x, w.shape[2:], dilation)
    elif padding == "valid":
        padding = 0
    geometry = Geometry(
        _per_axis(static["stride"], axes),
        _per_axis(padding, axes),
        dilation,
        static["groups"],
        static.get("transposed", False),
        _per_axis(static.get("output_padding", 0), axes),
    )
    return _finish(call, x, w, geometry.convolve(x, w, b), (weight, bias), inner, geometry)


def _finish(
    call: Call,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    operands: tuple[Tensor, Tensor | None],
    inner: tuple[int, ...],
    geometry: Geometry,
) -> Tensor:
    size, repeats = call.batch_size, prod(inner)

    def make_weight(gradient: Tensor) -> Use:
        use = ConvolutionUse(x, gradient, w, geometry)
        if repeats == 1:
            return use
        return PerSample(use.per_sample().view(size, repeats, *w.shape).sum(1))

    def make_bias(gradient: Tensor) -> PerSample:
        summed = gradient.flatten(2).sum(2, dtype=widen(gradient[:0]).dtype)
        return PerSample(summed if repeats == 1 else summed.view(size, repeats, -1).sum(1))

    positions = prod((x if geometry.transposed else y).shape[2:])
    rows = w.shape[0] // geometry.groups
    extent = Extent(positions, rows, prod(w.shape[1:]), geometry.groups) if repeats == 1 else None
    weight, bias = operands
    return call.finish(
        y,
        Recipe(weight, make_weight, extent),
        Recipe(bias, make_bias),
        saved=(x,),
        view=lambda y: y.unflatten(0, (size, *inner)),
    )


def _register(axes: int) -> None:
    plain = getattr(torch, f"conv{axes}d")
    transposed = getattr(torch, f"conv_transpose{axes}d")

    @register_rule(plain, name=f"conv{axes}d")
    def convolution(
        call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        return _convolve(
            call,
            axes,
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    @register_rule(transposed, name=f"conv_transpose{axes}d")
    def transposed_convolution(
        call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Tensor:  # fmt: skip
        return _convolve(
            call, axes, input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
            output_padding=output_padding, transposed=True,
        )  # fmt: skip


for _axes in (1, 2, 3):
    _register(_axes)
