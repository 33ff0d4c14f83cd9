"""Exact mode computes clipped sums on an integer grid and adds discrete Gaussian noise; see ``docs/exact.md``."""

from __future__ import annotations

from clipgrad.exact.mode import GridArithmetic
from clipgrad.exact.noise import DiscreteGaussianNoise

__all__ = ["DiscreteGaussianNoise", "GridArithmetic"]
