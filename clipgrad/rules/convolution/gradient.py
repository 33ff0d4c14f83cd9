"""This module chooses the fastest way to compute per-sample weight gradients of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.methods import (
    Method,
    by_exchange,
    by_groups,
    by_patches,
    by_rows,
    by_slices,
)

# On CPU, patches are faster than groups for patches up to this size (a first layer) and for groups with at least this
# many weights; in between, groups are up to 1.7x faster. Groups are slow without AVX-512 (docs/notes/performance.md).
_SMALL_PATCH = 64
_LARGE_WEIGHT = {"AVX512": 1 << 17, "AVX2": 1 << 14}
# Patches are written per input channel and read per output channel; with more input channels, writing costs too much.
_MOST_IN_PER_OUT = 1.5
# On CUDA, slices write and read a third as much as 3x3 patches, but their products have a third of the columns. With
# fewer columns than this, or more taps, slices are slower.
_FEWEST_COLUMNS, _MOST_TAPS = 128, 8
# On CUDA the library's own depthwise kernels run filters of one channel with fewer taps than this.
_LONG_FILTER = 32


def per_sample_gradient(
    gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry
) -> Tensor:
    """Return per-sample weight gradients ``[B, *shape]`` in the fastest way for these shapes on this device.

    The output gradient is ``[B, C_out, *spatial]``, and the input is ``[B, C_in, *spatial]`` with the same dtype.
    """
    return fastest_method(input.device, shape, geometry)(gradient, input, shape, geometry)


def fastest_method(device: torch.device, shape: Sequence[int], geometry: Geometry) -> Method:
    """Return the fastest way; results do not depend on the way."""
    on_cpu, taps = device.type == "cpu", prod(shape[2:])
    if shape[1] == 1 and geometry.groups > 1:
        return by_exchange if on_cpu or taps >= _LONG_FILTER else by_groups
    if taps == 1:
        return by_patches  # a view of the image, or every stride-th pixel of it
    if _unfolds_gradient(shape, geometry):
        return by_rows
    if not on_cpu:
        # With groups the library would run one kernel per group, that is per sample.
        return by_slices if _can_slice(shape, geometry) else by_patches
    if shape[1] * taps <= _SMALL_PATCH:
        return by_patches
    capability = torch.backends.cpu.get_cpu_capability()
    large = _LARGE_WEIGHT.get(capability, _LARGE_WEIGHT["AVX512"])
    paid_back = shape[1] <= _MOST_IN_PER_OUT * shape[0] / geometry.groups
    return by_patches if paid_back and prod(shape) // geometry.groups >= large else by_groups


def _unfolds_gradient(shape: Sequence[int], geometry: Geometry) -> bool:
    """Return whether the output gradient can be unfolded, and its patches are smaller than those of the image."""
    fits = all(
        pad <= (size - 1) * dilation
        for size, dilation, pad in zip(shape[2:], geometry.dilation, geometry.padding, strict=True)
    )
    usual = geometry.groups == 1 and not geometry.transposed and set(geometry.stride) == {1}
    return usual and fits and shape[0] < shape[1] and shape[0] * prod(shape[2:]) <= _SMALL_PATCH


def _can_slice(shape: Sequence[int], geometry: Geometry) -> bool:
    return (
        geometry.groups == 1
        and geometry.stride[0] == 1
        and 1 < shape[2] <= _MOST_TAPS
        and shape[1] * prod(shape[3:]) >= _FEWEST_COLUMNS
    )
