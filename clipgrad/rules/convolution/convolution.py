"""This module registers rules for plain and transposed convolutions of one to three axes with any options."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules.canonical import PerSample, Use
from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.use import ConvolutionUse, use_of
from clipgrad.rules.names import functional_aten_names_of
from clipgrad.rules.operands import lowered, widen
from clipgrad.rules.registry import Call, Decline, Extent, Recipe, register_rule


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * axes if len(value) == 1 else tuple(value)


def _same_padding(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Apply ``padding='same'`` as PyTorch does: symmetric where possible, an odd element at the end."""
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _convolve(
    call: Call, axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, **static: Any
) -> Tensor:
    if not call.has_batch_axis(input):
        raise Decline
    x, w = lowered(call.batched(input)), call.shared(weight)
    b = None if bias is None else call.shared(bias)
    if x.numel() == 0:
        raise Decline  # the fallback runs empty inputs
    inner = x.shape[1 : x.dim() - axes - 1]  # a sample's own batch axis, or ()
    x = x.reshape(-1, *x.shape[-axes - 1 :])
    dilation = _per_axis(static["dilation"], axes)
    padding = static["padding"]
    if padding == "same":
        if any(step != 1 for step in _per_axis(static["stride"], axes)):
            raise Decline  # PyTorch refuses this call with its own message
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
        if repeats == 1:
            return use_of(x, gradient, w, geometry)
        use = ConvolutionUse(x, gradient, w, geometry)
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

    @register_rule(plain, *functional_aten_names_of(f"conv{axes}d"), name=f"conv{axes}d")
    def convolution(
        call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        return _convolve(
            call, axes, input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )  # fmt: skip

    @register_rule(
        transposed,
        *functional_aten_names_of(f"conv_transpose{axes}d"),
        name=f"conv_transpose{axes}d",
    )
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
