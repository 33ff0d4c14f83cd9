"""What noise has to look like, shared by the tests of noise.

Every statistical check allows eight standard deviations of its own statistic, so that a right source
fails it with probability 2 Q(8) = 1.3e-15, a few thousand times per run at most. What it must find, a
sigma wrong by half or a repeated stream, lies far outside.
"""

import math

import torch
from torch import Tensor

from clipgrad.noise import NoiseSource, SeededNoise

PIECE = 2**15  # values per draw on the CPU


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(torch.Generator().manual_seed(seed))


def draw(source: NoiseSource, *shape: int, sigma: float = 1.0) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float64)
    source.add_gaussian_([total], sigma)
    return total


def check_gaussian(values: Tensor, sigma: float) -> None:
    """Mean, variance, and the probability of lying within 1, 2 and 3 sigma."""
    z = values.double().flatten() / sigma
    n = z.numel()
    assert abs(z.mean()) < 8 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 8 * math.sqrt(2 / n)
    for bound in (1, 2, 3):
        p = math.erf(bound / math.sqrt(2))
        assert abs((z.abs() < bound).double().mean() - p) < 8 * math.sqrt(p * (1 - p) / n)


def check_independent(rows: Tensor) -> None:
    """No two rows correlate, neither directly nor through their squares."""
    for features in (rows, rows.square()):
        correlation = torch.corrcoef(features) - torch.eye(len(rows), dtype=rows.dtype)
        assert correlation.abs().max() < 8 / math.sqrt(rows.shape[1])
