"""This module launches the Gram kernel after a self-test on the device. It needs Triton."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from clipgrad.kernels import gram_kernels as kernels
from clipgrad.kernels.half_products import HALF
from clipgrad.kernels.launcher import on_device, passes

_TILE = 64
# Elements multiplied at a time; the larger depth needs 96 KiB of shared memory and a fifth less time on an H100.
_DEPTH, _SMALLER_DEPTH, _ROOMY = 64, 32, 128 * 1024
# A multiprocessor with one block waits for each product. On an H200 with 132 of them, 144 blocks of half precision took
# 51 us with twice the depth instead of 56, while 288 blocks took 44 instead of 30.
_FEW_BLOCKS = 1.5  # for each multiprocessor
# Blocks of both factors that are loaded ahead. Half precision has room for one more, which saves 8 to 22 % on an H200.
_STAGES, _HALF_STAGES = 3, 4
# With less work, batched products, which split a sample, use more of the device.
_FEWEST_POSITIONS, _FEWEST_BLOCKS = 16, 32
_LARGEST_OFFSET = 2**31  # the kernel's offsets within a sample have 32 bits
_SELF_TEST_TOLERANCE = 1e-5  # the largest relative error of three TF32 products on an H100 was 7e-7
_UNIT = 8  # elements: 16 bytes of half precision


def gram_sums(left: Tensor, right: Tensor) -> Tensor | None:
    """Return parts of squared norms and of the three lengths of ``rules/gram.py``; None if the kernel does not suit.

    The parts are ``[4, B, number_of_parts(S)]``; their sums over the last axis are wanted. ``left`` is ``[B, S, rows]``
    and ``right`` is ``[B, S, columns]``, both float32 or of half precision, on one CUDA device.
    """
    positions = left.shape[1]
    if positions < _FEWEST_POSITIONS or len(left) * number_of_parts(positions) < _FEWEST_BLOCKS:
        return None
    if max(map(_extent, (left, right))) >= _LARGEST_OFFSET:
        return None
    if not all(_usable_on(left.device, dtype) for dtype in {left.dtype, right.dtype}):
        return None
    return launch(left, right)


def number_of_parts(positions: int) -> int:
    """Return how many blocks of the upper triangle the kernel computes for each sample."""
    side = -(-positions // _TILE)
    return side * (side + 1) // 2


def launch(left: Tensor, right: Tensor) -> Tensor:
    samples, positions, _ = left.shape
    blocks = number_of_parts(positions)
    found = left.new_empty(4, samples, blocks, dtype=torch.float32)
    strides = *left.stride()[:2], *right.stride()[:2]
    unit = _UNIT if all(stride % _UNIT == 0 for stride in strides) else 1
    in_half = {left.dtype, right.dtype} <= {*HALF}
    depth, stages = _depth_and_stages(left.device, in_half, samples * blocks)
    with on_device(left.device):
        kernels.gram_sums[(samples * blocks,)](
            left,
            right,
            found,
            positions,
            blocks,
            left.shape[2],
            right.shape[2],
            *_in_units(left, unit),
            *_in_units(right, unit),
            1.0,
            UNIT=unit,
            TILE=_TILE,
            DEPTH=depth,
            num_warps=4,
            num_stages=stages,
        )
    return found


def _in_units(factor: Tensor, unit: int) -> tuple[int, ...]:
    sample, position, element = factor.stride()
    return sample // unit, position // unit, element


def passes_self_test(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether the kernel agrees with float64 for full and partial tiles, and dense rows and columns."""
    for positions, rows, columns in ((64, 64, 32), (67, 5, 40), (200, 33, 7), (67, 200, 130)):
        count = 3 * positions * (rows + columns)
        # These values are pseudorandom without a change to any RNG state.
        ordinals = torch.arange(count, dtype=torch.float64, device=device)
        values = ordinals.sin().mul(43758.5453).frac().to(dtype).double()
        left = values[: 3 * positions * rows].view(3, rows, positions).transpose(1, 2)
        right = values[3 * positions * rows :].view(3, positions, columns)
        expected = (left.transpose(1, 2) @ right).square().sum((1, 2))
        lengths = left.norm(dim=2), right.norm(dim=2)
        wanted = torch.stack(
            [expected, *(length.sum(1) for length in lengths), (lengths[0] * lengths[1]).sum(1)]
        )
        error = (launch(left.to(dtype), right.to(dtype)).sum(2).double() - wanted).abs() / wanted
        if not bool((error < _SELF_TEST_TOLERANCE).all()):
            return False
    return True


@cache
def _usable_on(device: torch.device, dtype: torch.dtype) -> bool:
    return torch.version.hip is None and passes(
        lambda: passes_self_test(device, dtype), f"computes {dtype} norms on {device}"
    )


def _depth_and_stages(device: torch.device, in_half: bool, programs: int) -> tuple[int, int]:
    """Return how many elements are multiplied at a time, and how many blocks of them are loaded ahead."""
    multiprocessors, is_roomy = _size_of(device)
    if not is_roomy:
        return _SMALLER_DEPTH, _HALF_STAGES if in_half else _STAGES
    if in_half and programs <= _FEW_BLOCKS * multiprocessors:
        return 2 * _DEPTH, _STAGES
    return _DEPTH, _HALF_STAGES if in_half else _STAGES


@cache
def _size_of(device: torch.device) -> tuple[int, bool]:
    """Return the number of multiprocessors, and whether one has the shared memory for the larger depth."""
    if device.type != "cuda":  # Triton's interpreter
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", 0)
    return properties.multi_processor_count, room >= _ROOMY


def _extent(factor: Tensor) -> int:
    """Return one more than the largest offset from the first element of a sample, including partial tiles."""
    _, *strides = factor.stride()
    _, *sizes = factor.shape
    return 1 + sum(stride * (size + _TILE) for stride, size in zip(strides, sizes, strict=True))
