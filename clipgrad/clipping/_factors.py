"""Turn a norm into a factor, so that factor times norm stays within a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """This rule scales by ``min(1, C / norm)``: gradients within the bound stay unchanged."""

    def factors(self, norms: Tensor, bound: float | Tensor, rescale: bool) -> Tensor:
        """Return factors ``[B]``; a zero norm gives 1, or ``1 / C`` if rescaled, and a NaN norm gives NaN.

        Args:
            norms: Per-sample L2 norms ``[B]``.
            bound: C, positive and finite; a scalar tensor in a graph that must serve every C.
            rescale: Whether to divide the factors by C.
        """
        if not rescale:
            return (bound / norms).clamp(max=1.0)
        most = 1.0 / bound
        if not isinstance(most, Tensor):
            most = torch.full_like(norms, most)
        return torch.minimum(most, norms.reciprocal())


@dataclass(frozen=True)
class Normalise:
    """This rule scales by ``C / (norm + gamma)``, which brings all gradients but very small ones close to the bound.

    The factor is at most ``C / gamma`` times the factor that clips to ``gamma``. So rounding errors are at most
    ``C / gamma`` times those of a sum clipped to ``gamma``. Without ``gamma`` there would be no such bound: a gradient
    that is only rounding error would get the same weight as any other.
    """

    gamma: float

    def factors(self, norms: Tensor, bound: float | Tensor, rescale: bool) -> Tensor:
        """Return factors ``[B]`` as ``Clip.factors`` does; a zero norm gives ``C / gamma``, which is finite."""
        return (1.0 if rescale else bound) / (norms + self.gamma)


Rule: TypeAlias = Clip | Normalise
