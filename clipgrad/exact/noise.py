"""Discrete Gaussian noise on a grid: exact, where floating-point noise leaks through its least significant bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from clipgrad.exact.sampler import MOST_SIGMA, discrete_gaussian
from clipgrad.noise import checks

# A sum within this is an exact integer, and so is what noise makes of it.
_LARGEST_SUM = 2**52
# Noise of fewer steps would be rounded up to a whole number by more than one part in a hundred.
_LEAST_SIGMA = 100


class DiscreteGaussianNoise:
    """The private noise of a grid: ``gamma`` times an integer drawn from the discrete Gaussian.

    An integer z has a probability proportional to ``exp(-z^2 / (2 S^2))`` with ``S = ceil(sigma / gamma)``, exactly:
    the noise is never smaller than asked for, and larger by less than one part in S. Samples are drawn by integer
    arithmetic from random bits of the operating system (Canonne, Kamath and Steinke 2020, arXiv:2004.00010), so
    copies and forked children share nothing. How long it takes depends on what is drawn; see ``docs/exact.md``.

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
            tensors: Dense float64 tensors of multiples of the grid, each once.
            sigma: In effect the standard deviation, in the tensors' own unit; 0 adds and draws nothing.

        Raises:
            ValueError: If a value is no multiple of the grid or beyond ``2**52`` steps of it; if ``sigma`` is negative,
                not finite, or not between 100 and 2**28 steps; if a tensor is there twice. No tensor has got noise
                then.
            TypeError: If a tensor is not dense or not float64.
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
            for tensor, exact, drawn in zip(targets, integers, noise, strict=True):
                # Beyond 2**53 the conversion rounds, but what it rounds is private already.
                total = (exact + drawn).to(torch.float64).mul_(self.grid)
                tensor.copy_(total.view(tensor.shape))

    def state_dict(self) -> dict[str, Any]:
        """A marker only: there is no state to keep."""
        return {"kind": "DiscreteGaussianNoise", "format": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that ``state`` is of this class; there is nothing to restore.

        Raises:
            ValueError: If ``state`` is another noise source's.
        """
        checks.state(state, "DiscreteGaussianNoise")

    def _integers(self, index: int, tensor: Tensor) -> Tensor:
        """The tensor's values in steps, flat, on the CPU; exact."""
        if tensor.dtype is not torch.float64:
            raise TypeError(
                f"tensors[{index}] must be float64, got {tensor.dtype}: a grid is kept in float64."
            )
        steps = tensor.reshape(-1).cpu() / self.grid
        if not bool(((steps == steps.round()) & (steps.abs() <= _LARGEST_SUM)).all()):
            raise ValueError(
                f"tensors[{index}] holds a value that is no multiple of grid = {self.grid}, or more than 2**52 times "
                "it; clip with clipped_grad(..., grid=...) of the same grid."
            )
        return steps.to(torch.int64)


def whole_steps(sigma: float, grid: float) -> int:
    """``sigma / grid`` rounded up, exactly.

    Raises:
        ValueError: If there are too few or too many, with a grid that works.
    """
    steps = math.ceil(Fraction(sigma) / Fraction(grid))
    if not _LEAST_SIGMA <= steps <= MOST_SIGMA:
        raise ValueError(
            f"sigma={sigma} is {steps} steps of grid={grid}, and noise on a grid has 100 to 2**28 of them; a grid "
            f"near {2.0 ** round(math.log2(sigma) - 18)} gives 2**18."
        )
    return steps
