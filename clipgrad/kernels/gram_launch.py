"""This module launches the Gram kernel after a self-test on the device. It needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
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
# Several left factors need 182 registers, with which two blocks run on a multiprocessor. With three blocks an H200 took
# 55 us instead of 61, although some values are then kept in other memory.
_REGISTERS = 168
# With less work, batched products, which split a sample, use more of the device.
_FEWEST_POSITIONS, _FEWEST_BLOCKS = 16, 32
_LARGEST_OFFSET = 2**31  # the kernel's offsets within a sample have 32 bits
_SELF_TEST_TOLERANCE = 1e-5  # the largest relative error of three TF32 products on an H100 was 7e-7
_UNIT = 8  # elements: 16 bytes of half precision


def gram_sums(lefts: Sequence[Tensor], right: Tensor) -> Tensor | None:
    """Return parts of squared norms and of the three lengths of ``rules/gram.py``; None if the kernel does not suit.

    The parts are ``[len(lefts), 4, B, number_of_parts(S)]``; their sums over the last axis are wanted. Each left factor
    is ``[B, S, rows]`` and ``right`` is ``[B, S, columns]``, all float32 or of half precision, on one CUDA device.
    """
    samples, positions, _ = right.shape
    if positions < _FEWEST_POSITIONS or samples * number_of_parts(positions) < _FEWEST_BLOCKS:
        return None
    if max(map(_extent, (*lefts, right))) >= _LARGEST_OFFSET:
        return None
    if not all(_usable_on(right.device, dtype) for dtype in {f.dtype for f in (*lefts, right)}):
        return None
    return launch(lefts, right)


def number_of_parts(positions: int) -> int:
    """Return how many blocks of the upper triangle the kernel computes for each sample."""
    side = -(-positions // _TILE)
    return side * (side + 1) // 2


def launch(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    samples, positions, _ = right.shape
    blocks = number_of_parts(positions)
    found = right.new_empty(len(lefts), 4, samples, blocks, dtype=torch.float32)
    factors = (*lefts, right)
    is_aligned = all(stride % _UNIT == 0 for factor in factors for stride in factor.stride()[:2])
    unit = _UNIT if is_aligned else 1
    in_half = {factor.dtype for factor in factors} <= {*HALF}
    depth, stages = _depth_and_stages(right.device, in_half, samples * blocks)
    with on_device(right.device):
        kernels.gram_sums[(samples * blocks,)](
            tuple(lefts),
            right,
            found,
            positions,
            blocks,
            tuple(left.shape[2] for left in lefts),
            right.shape[2],
            tuple(_in_units(left, unit) for left in lefts),
            _in_units(right, unit),
            1.0,
            UNIT=unit,
            TILE=_TILE,
            DEPTH=depth,
            num_warps=4,
            num_stages=stages,
            maxnreg=_REGISTERS if len(lefts) > 1 else None,
        )
    return found


def _in_units(factor: Tensor, unit: int) -> tuple[int, ...]:
    sample, position, element = factor.stride()
    return sample // unit, position // unit, element


def passes_self_test(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether the kernel agrees with float64 for full and partial tiles, and dense rows and columns."""
    for positions, rows, columns in ((64, 64, 32), (67, 5, 40), (200, 33, 7), (67, 200, 130)):
        count = 3 * positions * (2 * rows + columns)
        # These values are pseudorandom without a change to any RNG state.
        ordinals = torch.arange(count, dtype=torch.float64, device=device)
        values = ordinals.sin().mul(43758.5453).frac().to(dtype).double()
        first, second, last = values.split([3 * positions * w for w in (rows, rows, columns)])
        lefts = first.view(3, rows, positions).transpose(1, 2), second.view(3, positions, rows)
        right = last.view(3, positions, columns)
        wanted = torch.stack([_by_definition(left, right) for left in lefts])
        found = launch([left.to(dtype) for left in lefts], right.to(dtype)).sum(3).double()
        if not bool(((found - wanted).abs() / wanted < _SELF_TEST_TOLERANCE).all()):
            return False
    return True


def _by_definition(left: Tensor, right: Tensor) -> Tensor:
    norms = (left.transpose(1, 2) @ right).square().sum((1, 2))
    lengths = left.norm(dim=2), right.norm(dim=2)
    return torch.stack(
        [norms, *(length.sum(1) for length in lengths), (lengths[0] * lengths[1]).sum(1)]
    )


@cache
def _usable_on(device: torch.device, dtype: torch.dtype) -> bool:
    return torch.version.hip is None and passes(
        lambda: passes_self_test(device, dtype), f"computes {dtype} norms on {device}"
    )


def _depth_and_stages(device: torch.device, in_half: bool, programs: int) -> tuple[int, int]:
    """Return how many elements are multiplied at a time, and how many blocks of them are loaded ahead."""
    multiprocessors, is_roomy = _size_of(device)
    if is_roomy and in_half and programs <= _FEW_BLOCKS * multiprocessors:
        return 2 * _DEPTH, _STAGES
    return _DEPTH if is_roomy else _SMALLER_DEPTH, _HALF_STAGES if in_half else _STAGES


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
