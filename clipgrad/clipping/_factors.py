"""From a norm to a factor, so that factor times norm stays within a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """``min(1, C / norm)``: what is within the bound stays as it is."""

    def factors(self, norms: Tensor, bound: float | Tensor, rescale: bool) -> Tensor:
        """Factors ``[B]``; a zero norm gives 1, a NaN norm NaN.

        Args:
            norms: Per-sample L2 norms ``[B]``.
            bound: C, positive and finite; a scalar tensor in a graph that must serve every C.
            rescale: Divide by C.
        """
        if not rescale:
            return (bound / norms).clamp(max=1.0)
        most = 1.0 / bound
        if not isinstance(most, Tensor):
            most = torch.full_like(norms, most)
        return torch.minimum(most, norms.reciprocal())


@dataclass(frozen=True)
class Normalise:
    """``C / (norm + gamma)``: every gradient is brought close to the bound, small ones less so.

    It never exceeds ``C / gamma`` times the factor that clips to ``gamma``, so rounding does to it what it does to a
    clipped sum in units of ``gamma``. Without ``gamma`` nothing would hold: a gradient that is nothing but rounding
    error would come out as large as any other.
    """

    gamma: float

    def factors(self, norms: Tensor, bound: float | Tensor, rescale: bool) -> Tensor:
        """Factors ``[B]``, as those of ``Clip``; a zero norm gives ``C / gamma``, which is finite."""
        return (1.0 if rescale else bound) / (norms + self.gamma)


Rule: TypeAlias = Clip | Normalise
