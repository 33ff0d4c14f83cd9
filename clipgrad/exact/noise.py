"""Discrete Gaussian noise on a grid is exact; floating-point noise leaks through its least significant bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from clipgrad.exact.sampler import MOST_SIGMA, discrete_gaussian
from clipgrad.noise import checks

# A sum of at most this many steps is an exact integer; the sum with noise, an int64, is one too.
_LARGEST_SUM = 2**52
# A smaller sigma would grow by more than one part in a hundred when it is rounded up to whole steps.
_LEAST_SIGMA = 100


class DiscreteGaussianNoise:
    """This is the private noise of exact mode: ``gamma`` times an integer sampled from the discrete Gaussian.

    An integer z has a probability proportional to ``exp(-z^2 / (2 S^2))`` with ``S = ceil(sigma / gamma)``, exactly. So
    the noise is never smaller than requested, and larger by less than one part in S. Samples come from integer
    arithmetic on random bits of the operating system (Canonne, Kamath and Steinke 2020, arXiv:2004.00010), so copies
    and forked children share nothing. The time depends on the sampled values; see ``docs/exact.md``.

    Args:
        grid: The spacing ``gamma``, a power of two.

    Raises:
        ValueError: If ``grid`` is no power of two.

    Examples:
        >>> sums = [torch.zeros(3, dtype=torch.float64)]
        >>> DiscreteGaussianNoise(2.0**-10).add_gaussian_(sums, sigma=2.0)
        >>> [value.is_integer() for value in (sums[0] * 2**10).tolist()]
        [True, True, True]
    """

    def __init__(self, grid: float) -> None:
        spacing = checks.real("grid", grid)
        if not (math.isfinite(spacing) and math.frexp(spacing)[0] == 0.5):
            raise ValueError(f"grid must be a power of two, got {grid!r}; 2.0**-20, for example.")
        self.grid = spacing

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add fresh, independent discrete Gaussian noise of parameter ``sigma`` in place.

        Args:
            tensors: Dense float64 tensors of multiples of the grid; no tensor may occur twice.
            sigma: The standard deviation up to rounding, in the tensors' own unit. With 0 nothing is sampled or added.

        Raises:
            ValueError: If a value is no multiple of the grid or exceeds ``2**52`` steps; if ``sigma`` is negative, not
                finite, or not between 100 and 2**28 steps; if a tensor occurs twice. No tensor is changed then.
            TypeError: If a tensor is not dense or not float64. No tensor is changed then.
        """
        scale = checks.scale("sigma", sigma)
        if scale == 0.0:
            return
        steps = whole_steps(scale, self.grid)
        with torch.no_grad():
            targets = checks.targets(tensors, scale)
            integers = [self._integers(index, tensor) for index, tensor in enumerate(targets)]
            sizes = [exact.numel() for exact in integers]
            noise = torch.from_numpy(discrete_gaussian(sum(sizes), steps)).split(sizes)
            for tensor, exact, sampled in zip(targets, integers, noise, strict=True):
                # Beyond 2**53 the conversion rounds, which is harmless: the sum with noise is private already.
                total = (exact + sampled).to(torch.float64).mul_(self.grid)
                tensor.copy_(total.view(tensor.shape))

    def state_dict(self) -> dict[str, Any]:
        """Return a marker only: there is no state to keep."""
        return {"kind": "DiscreteGaussianNoise", "format": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that ``state`` belongs to this class; there is nothing to restore.

        Raises:
            ValueError: If ``state`` comes from another noise source.
        """
        checks.require_state(state, "DiscreteGaussianNoise")

    def _integers(self, index: int, tensor: Tensor) -> Tensor:
        """Return the tensor's values in steps as a flat int64 tensor on the CPU, exactly."""
        if tensor.dtype is not torch.float64:
            raise TypeError(
                f"tensors[{index}] must be float64, got {tensor.dtype}: sums on a grid are float64."
            )
        steps = tensor.reshape(-1).cpu() / self.grid
        if not bool(((steps == steps.round()) & (steps.abs() <= _LARGEST_SUM)).all()):
            raise ValueError(
                f"tensors[{index}] holds a value that is no multiple of grid = {self.grid}, or more than 2**52 times "
                "it; clip with clipped_grad(..., grid=...) of the same grid."
            )
        return steps.to(torch.int64)


def whole_steps(sigma: float, grid: float) -> int:
    """Return ``sigma / grid`` rounded up to an integer, exactly."""
    steps = math.ceil(Fraction(sigma) / Fraction(grid))
    if not _LEAST_SIGMA <= steps <= MOST_SIGMA:
        raise ValueError(
            f"sigma={sigma} is {steps} steps of grid={grid}, but must be between 100 and 2**28 steps. A grid near "
            f"{2.0 ** round(math.log2(sigma) - 18)} gives 2**18 steps."
        )
    return steps
