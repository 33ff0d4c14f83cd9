"""Per-sample weight gradients of a convolution: which way is fastest for which shapes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.methods import (
    Way,
    by_exchange,
    by_groups,
    by_patches,
    by_rows,
    by_slices,
)

# On CPU, patches win over groups while a patch is this small (a first layer), and again when the weights of a group
# are this large; in between groups are up to 1.7x faster. They are slow without AVX-512. See docs/performance.md.
_SMALL_PATCH = 64
_LARGE_WEIGHT = {"AVX512": 1 << 17, "AVX2": 1 << 14}
# Patches are written once for each input channel and read once for each output channel. With more of the former by this
# factor, writing is not paid back.
_MOST_IN_PER_OUT = 1.5
# On CUDA, slices are a third of 3x3 patches to write and read. Their products have a third of the columns; with fewer
# than this, or for more taps, that costs more than is gained.
_FEWEST_COLUMNS, _MOST_TAPS = 128, 8
# Filters of one channel and fewer taps than this are left to the library's own depthwise kernels on CUDA.
_LONG_FILTER = 32


def per_sample_gradient(
    gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry
) -> Tensor:
    """``[B, *shape]``, the fastest way for these shapes on this device.

    Args:
        gradient: Of the output, ``[B, C_out, *spatial]``.
        input: ``[B, C_in, *spatial]``, of the same dtype.
        shape: Of the weight.
        geometry: Of the convolution.
    """
    return fastest(input.device, shape, geometry)(gradient, input, shape, geometry)


def fastest(device: torch.device, shape: Sequence[int], geometry: Geometry) -> Way:
    """The way that is fastest; results do not depend on it."""
    on_cpu, taps = device.type == "cpu", prod(shape[2:])
    if shape[1] == 1 and geometry.groups > 1:
        return by_exchange if on_cpu or taps >= _LONG_FILTER else by_groups
    if taps == 1:
        return by_patches  # a view of the image, or every stride-th pixel of it
    if _few_rows(shape, geometry):
        return by_rows
    if not on_cpu:
        # By groups the library would run a kernel for each of them, that is for each sample.
        return by_slices if _sliceable(shape, geometry) else by_patches
    if shape[1] * taps <= _SMALL_PATCH:
        return by_patches
    capability = torch.backends.cpu.get_cpu_capability()
    large = _LARGE_WEIGHT.get(capability, _LARGE_WEIGHT["AVX512"])
    paid_back = shape[1] <= _MOST_IN_PER_OUT * shape[0] / geometry.groups
    return by_patches if paid_back and prod(shape) // geometry.groups >= large else by_groups


def _few_rows(shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether unfolding the output gradient is possible, and the smaller part of what unfolding the image would be."""
    fits = all(
        pad <= (size - 1) * dilation
        for size, dilation, pad in zip(shape[2:], geometry.dilation, geometry.padding, strict=True)
    )
    usual = geometry.groups == 1 and not geometry.transposed and set(geometry.stride) == {1}
    return usual and fits and shape[0] < shape[1] and shape[0] * prod(shape[2:]) <= _SMALL_PATCH


def _sliceable(shape: Sequence[int], geometry: Geometry) -> bool:
    return (
        geometry.groups == 1
        and geometry.stride[0] == 1
        and 1 < shape[2] <= _MOST_TAPS
        and shape[1] * prod(shape[3:]) >= _FEWEST_COLUMNS
    )
