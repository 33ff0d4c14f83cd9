"""Define what a noise source must do and how large the noise must be. Nothing here is random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from clipgrad.noise import checks


class NoiseSource(Protocol):
    """This protocol describes a source of noise: any object with these three methods."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add fresh, independent ``N(0, sigma^2)`` in place to every value of every tensor.

        Args:
            tensors: Dense floating-point tensors of any shape, stride and device; no tensor may occur twice.
            sigma: Standard deviation in the tensors' own unit. With 0 nothing is sampled or added.

        Raises:
            ValueError: If ``sigma`` is negative, infinite or NaN, or vanishes in a tensor's dtype, or if a tensor
                occurs twice.
            TypeError: If a tensor is not dense, or its dtype is not float64, float32, float16 or bfloat16.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: strings, integers and tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that :meth:`state_dict` of the same class returned.

        Raises:
            ValueError: If the state is something else.
        """
        ...


def gaussian_sigma(*, noise_multiplier: float, sensitivity: float) -> float:
    """Return the standard deviation of the noise, ``noise_multiplier * sensitivity``, after checking both.

    This is the Gaussian mechanism: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy" (2014),
    appendix A.

    Args:
        noise_multiplier: Noise per unit of sensitivity, finite and at least 0.
        sensitivity: The largest change of the sum by one sample (L2), in the sum's own unit.

    Returns:
        A positive, finite number; 0.0 if ``noise_multiplier`` is 0, for any sensitivity.

    Raises:
        ValueError: If no finite, positive noise of that size exists.

    Examples:
        >>> gaussian_sigma(noise_multiplier=1.5, sensitivity=2.0)
        3.0
        >>> gaussian_sigma(noise_multiplier=0.0, sensitivity=float("inf"))
        0.0
    """
    multiplier = checks.scale("noise_multiplier", noise_multiplier)
    if multiplier == 0.0:
        return 0.0
    bound = checks.real("sensitivity", sensitivity)
    sigma = multiplier * bound
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(
            f"sensitivity must be positive and finite when noise_multiplier is {multiplier}, got "
            f"{bound}, so that sigma = {sigma}: "
            + (
                "without sensitivity noise has no scale. "
                if bound == 0
                else "no noise hides an unbounded change. "
            )
            + "Give a positive, finite max_grad_norm, or noise_multiplier=0 to train without privacy."
        )
    return sigma
