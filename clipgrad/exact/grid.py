"""Clip gradients to an integer grid: integer arithmetic bounds what one sample contributes.

Everything up to the rounding is floating point and may err, since it is a function of one sample only. The privacy
guarantee rests on two exact computations: the comparison that accepts a rounded sample, and the sums.

Sums are float64 multiples of the spacing ``gamma``, a power of two, so that float64 arithmetic on them is integer
arithmetic below 2**53 steps. They stay below: a sample changes an element by at most ``C / gamma <= 2**26`` steps, and
a logical batch holds at most ``2**26`` samples, so no partial sum, in any order, exceeds ``2**52`` steps.

Reference: Kairouz, Liu and Steinke 2021 (arXiv:2102.06387), but rounding is to the nearest point instead of random. To
compensate, samples are clipped to a smaller norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from clipgrad import _validate
from clipgrad.clipping import Automatic, Clipping, ClippingStrategy, PerLayer, Relation

MOST_STEPS = 2**26
# With larger exponents sums of many samples could overflow, or multiples lose bits to underflow.
_MOST_EXPONENT = 900


@dataclass(frozen=True)
class Grid:
    """This class describes a grid of spacing ``gamma`` and clips to it."""

    spacing: float  # The distance of neighbouring grid points, ``gamma``
    clipping: Clipping  # Groups and their norms C
    sizes: tuple[int, ...]  # Number of elements of each parameter

    def __post_init__(self) -> None:
        for group, norm in enumerate(self.clipping.norms):
            size = self._size(group)
            if self.spacing**2 * size > norm**2:
                raise ValueError(
                    f"grid={self.spacing} is too coarse for max_grad_norm={norm} and {size} elements: rounding to it "
                    "would take more than half of the norm. The largest grid that works is "
                    f"{_power_of_two_below(norm / math.sqrt(size))}."
                )

    def clip(
        self, gradients: Sequence[Tensor], is_padding: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Clip every sample to the grid and sum the samples, except for padding.

        Return the sum of each parameter in float64; the norms before clipping, ``[B]`` per group; and which samples
        were dropped, boolean ``[B]``.
        """
        rounded: list[Tensor] = [gradient[:0] for gradient in gradients]
        norms, kept = [], []
        for group in range(len(self.clipping.groups)):
            members = self.clipping.members[group]
            rows = [self._in_steps(gradients[index]) for index in members]
            norm = _norms(rows)
            factors = (self._target(group) / norm).clamp(max=1.0)[:, None]
            rows = [row.mul_(factors).round_().add_(0.0) for row in rows]  # no negative zeros
            limit = squared_limit(self.clipping.norms[group], self.spacing)
            norms.append(norm * self.spacing)
            kept.append(norm.isfinite() & squares_within(rows, limit))
            for index, row in zip(members, rows, strict=True):
                rounded[index] = row
        keep = torch.stack(kept).all(0)
        dropped = ~keep
        if is_padding is not None:
            keep, dropped = keep & ~is_padding, dropped & ~is_padding
        sums = [
            torch.where(keep[:, None], row, 0.0).sum(0).mul_(self.spacing).view(gradient.shape[1:])
            for row, gradient in zip(rounded, gradients, strict=True)
        ]
        return sums, norms, dropped

    def _in_steps(self, gradient: Tensor) -> Tensor:
        """Return a copy in steps of the grid, ``[B, elements]``."""
        flat = gradient.reshape(gradient.shape[0], -1)
        return flat.to(torch.float64, copy=True).div_(self.spacing)

    def _target(self, group: int) -> float:
        """Return the norm to clip to, in steps, so that rounding to the nearest point does not exceed C.

        Rounding changes each of d elements by at most half a step, so the norm by at most ``sqrt(d) / 2``. The factor
        covers the float64 error of a norm of d elements and of the scaling: less than ``(d + 8) 2**-52``, in any order
        of the sum.
        """
        size = self._size(group)
        steps = self.clipping.norms[group] / self.spacing
        return steps * (1 - (size + 8) * 2.0**-52) - math.sqrt(size) / 2

    def _size(self, group: int) -> int:
        return max(1, sum(self.sizes[index] for index in self.clipping.members[group]))


def squares_within(rows: Sequence[Tensor], limit: int) -> Tensor:
    """Return whether the integers of each sample satisfy ``sum n^2 <= limit``, as an exact boolean ``[B]``.

    Squares and their partial sums below 2**53 are exact in float64, in any order. Rounding is monotonic and no term is
    negative. So a partial sum that reaches 2**53 never falls below it again, and exceeds the limit. A NaN fails every
    comparison.
    The limit is less than 2**53, since ``(C / gamma)^2`` is at most 2**52.
    """
    totals = torch.stack([row.square().sum(1) for row in rows]).sum(0)
    return totals <= float(limit)


def squared_limit(norm: float, spacing: float) -> int:
    """Return the largest integer that is at most ``(norm / spacing)^2``, exactly."""
    return math.floor((Fraction(norm) / Fraction(spacing)) ** 2)


def check_grid(grid: float, clipping: Clipping, strategy: ClippingStrategy) -> float:
    """Return the spacing, or refuse it if it is no power of two or does not suit the norms or the strategy."""
    rules = strategy.values() if isinstance(strategy, Mapping) else [strategy]
    if any(isinstance(rule, Automatic | PerLayer) for rule in rules):
        raise ValueError(
            f"grid cannot be combined with max_grad_norm={strategy!r}, whose bound is a rounded number; give a norm, "
            "or a mapping from prefix to norm."
        )
    spacing = _validate.positive("grid", grid)
    below = _power_of_two_below(spacing)
    if spacing != below or abs(math.log2(spacing)) > _MOST_EXPONENT:
        raise ValueError(
            f"grid must be a power of two, so that multiples of it add up without rounding, got {grid!r}; the nearest "
            f"ones are {below} and {2 * below}."
        )
    for norm in clipping.norms:
        if not 0 < norm < math.inf:
            raise ValueError(
                f"grid needs a positive, finite max_grad_norm, got {norm}: gradients are clipped below it and rounded."
            )
        if norm > MOST_STEPS * spacing:
            raise ValueError(
                f"grid={spacing} is too fine for max_grad_norm={norm}: integers beyond 2**53 could occur. The "
                f"smallest grid that works is {_power_of_two_above(norm / MOST_STEPS)}."
            )
    return spacing


def exact_sensitivity(clipping: Clipping, relation: Relation) -> float:
    """Return the smallest float that is at least ``sqrt(sum C_k^2)``, or twice that float for replace-one."""
    squared = sum(Fraction(norm) ** 2 for norm in clipping.norms)
    bound = math.hypot(*clipping.norms)
    while Fraction(bound) ** 2 < squared:
        bound = math.nextafter(bound, math.inf)
    return 2 * bound if relation is Relation.REPLACE_ONE else bound


def exact_sigma(noise_multiplier: float, sensitivity: float) -> float:
    """Return the smallest float that is at least ``noise_multiplier * sensitivity``."""
    sigma = noise_multiplier * sensitivity
    if Fraction(sigma) < Fraction(noise_multiplier) * Fraction(sensitivity):
        return math.nextafter(sigma, math.inf)
    return sigma


def _norms(rows: Sequence[Tensor]) -> Tensor:
    parts = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows])
    total: Tensor = torch.linalg.vector_norm(parts, dim=0)
    return total


def _power_of_two_below(value: float) -> float:
    """Return the largest power of two that is at most ``value``."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def _power_of_two_above(value: float) -> float:
    below = _power_of_two_below(value)
    return below if below == value else 2 * below
