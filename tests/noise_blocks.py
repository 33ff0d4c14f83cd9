"""What tests of blocks of correlated noise share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipgrad.factorisation.toeplitz import column_norm, square_root
from clipgrad.noise.block import Block
from clipgrad.noise.correlated import CorrelatedNoise
from clipgrad.noise.step_noise import StepSums
from tests.factorisation.oracle import matrix


def block_of(size: int, lags: int, ahead: int, first: int, known: int, dtype: torch.dtype) -> Block:
    """A block whose ring holds NaN wherever no row was."""
    ring = torch.full((lags + ahead, size), math.nan, dtype=dtype, device="cpu")
    block = Block(ring, square_root(lags + 1)[1:].tolist(), first, ahead, known)
    generator = torch.Generator().manual_seed(size + 7 * first)
    for index in block.past() + block.new():
        ring[index] = torch.randn(size, dtype=dtype, device="cpu", generator=generator)
    return block


def run(noise: CorrelatedNoise, steps: range, shapes: list[tuple[int, ...]], **options: Any) -> Any:
    """Return what some steps publish of zeros, ``[steps, values]``."""
    found = []
    for t in steps:
        given = [torch.zeros(shape, **options) for shape in shapes]
        names = [str(index) for index in range(len(given))]
        means = noise.next(StepSums(given, t, names, sigma=1.0, divisor=2.0, in_place=bool(t % 2)))
        found.append(torch.cat([2 * mean.double().flatten() for mean in means]))
    return torch.stack(found)


def check_white(found: Tensor, column: Any) -> None:
    """Undone, the noise of all steps is independent and of the right size."""
    z = torch.from_numpy(matrix(column, len(found))).to(found) @ found
    z = z / column_norm(np.array(column))
    size = found.shape[1]
    covariance = z @ z.T / size - torch.eye(len(z)).to(z)
    assert covariance.abs().max() < 8 / np.sqrt(size) * 1.5
