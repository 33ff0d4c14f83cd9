"""This module launches the kernel for weighted sums of products after a self-test on the device. It needs Triton."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from clipgrad.kernels import weighted_kernels as kernels

_log = logging.getLogger("clipgrad")
_LARGEST_OFFSET = 2**31  # the kernel's offsets within a sample have 32 bits
_PROVED = 1e-5
_FEWEST_POSITIONS = 16  # a shorter product does not fill a tensor core
_MOST_PARTS = 8
_usable: dict[tuple[torch.device, torch.dtype], bool] = {}


class Shape(NamedTuple):
    """Rows and columns of a block, positions at a time, warps, and stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_SHAPE = Shape(128, 128, 64, 8, 4)


def weighted_product(left: Tensor, right: Tensor, factors: Tensor) -> Tensor | None:
    """Run the kernel, or return None if it does not suit; arguments are those of ``half_products``."""
    positions = left.shape[1]
    if positions < _FEWEST_POSITIONS or not len(left):
        return None
    left, right = in_rows(left), in_rows(right)
    if max(map(_extent, (left, right))) >= _LARGEST_OFFSET:
        return None
    if not _usable_on(left.device, left.dtype):
        return None
    return launch(left, right, factors, parts(left, right))


def in_rows(factor: Tensor) -> Tensor:
    """Return the factor with the elements of a position side by side, as the kernel reads them."""
    return factor if factor.stride(2) == 1 else factor.contiguous()


def parts(left: Tensor, right: Tensor) -> int:
    """Return into how many parts samples are cut, so that the last round of blocks keeps the device busy."""
    samples, _, rows = left.shape
    blocks = -(-rows // _SHAPE.rows) * -(-right.shape[2] // _SHAPE.columns)
    at_once = _processors(left.device)
    most = min(_MOST_PARTS, samples)
    # Each part writes its sum, which is then read: about the time of half a sample's product.
    return min(
        range(1, most + 1),
        key=lambda count: -(-count * blocks // at_once) * -(-samples // count) + count / 2,
    )


def launch(
    left: Tensor, right: Tensor, factors: Tensor, count: int = 1, shape: Shape = _SHAPE
) -> Tensor:
    samples, positions, rows = left.shape
    columns = right.shape[2]
    found = factors.new_empty(count, rows, columns)
    blocks = -(-rows // shape.rows) * -(-columns // shape.columns)
    with _on(left.device):
        kernels.weighted_product[(blocks, count)](
            left,
            right,
            factors,
            found,
            samples,
            -(-samples // count),
            positions,
            rows,
            columns,
            *left.stride()[:2],
            *right.stride()[:2],
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            DEPTH=shape.depth,
            BAND=8,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return found[0] if count == 1 else found.sum(0)


def proved(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel agrees with float64 for full and partial blocks, and skips what it must skip."""
    for samples, positions, rows, columns, count in ((3, 64, 128, 128, 1), (4, 70, 40, 150, 3)):
        total = samples * positions * (rows + columns)
        # These values are pseudorandom without a change to any RNG state.
        ordinals = torch.arange(total, dtype=torch.float64, device=device)
        values = ordinals.sin().mul(43758.5453).frac().to(dtype)
        left = values[: samples * positions * rows].view(samples, positions, rows)
        right = values[samples * positions * rows :].view(samples, positions, columns)
        factors = torch.linspace(0.3, 1.7, samples, device=device)
        factors[1] = 0
        wanted = (left.double() * factors.double()[:, None, None]).flatten(
            0, 1
        ).t() @ right.double().flatten(0, 1)
        left[1], right[1] = torch.nan, torch.inf
        error = (launch(left, right, factors, count).double() - wanted).norm() / wanted.norm()
        if not bool(error < _PROVED):
            return False
    return True


def _usable_on(device: torch.device, dtype: torch.dtype) -> bool:
    key = device, dtype
    if key not in _usable:
        reason = "its self-test differs from float64"
        try:
            _usable[key] = torch.version.hip is None and proved(device, dtype)
        except Exception as error:  # compilers and drivers raise errors of many types
            _usable[key] = False
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not _usable[key] and torch.version.hip is None:
            _log.warning(
                "clipgrad adds up %s gradients on %s without the Triton kernel (%s).",
                dtype,
                device,
                reason,
            )
    return _usable[key]


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _extent(factor: Tensor) -> int:
    """Return one more than the largest offset from the first element of a sample, including partial blocks."""
    block = max(_SHAPE.rows, _SHAPE.columns, _SHAPE.depth)
    return 1 + sum(
        stride * (size + block)
        for stride, size in zip(factor.stride()[1:], factor.shape[1:], strict=True)
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
