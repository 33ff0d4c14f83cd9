"""Compute the noised mean: noise and division by the expected batch size, in one pass where the source allows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipgrad.noise import checks
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.system import SystemNoise

_PLAIN = SystemNoise.add_gaussian_


def noised_mean(
    source: NoiseSource,
    sums: Sequence[Tensor],
    sigma: float,
    divisor: float,
    *,
    out_of_place: bool = False,
) -> list[Tensor]:
    """Return ``(sums + N(0, sigma^2)) / divisor``, rounded after the addition and after the division.

    On CUDA the division is a product with the divisor's rounded inverse, as is PyTorch's own division by a number.

    Args:
        source: The source of the noise. If it is no ``SystemNoise``, or overrides ``add_gaussian_``, the division is a
            pass of its own.
        sums: Dense tensors, each at most once. Their values are overwritten, unless a kernel writes its results to new
            tensors.
        sigma: Standard deviation of the noise on the sums.
        divisor: A public constant.
        out_of_place: Return new tensors instead of the tensors of ``sums``.

    Raises:
        ValueError: If the noise is refused; see :meth:`NoiseSource.add_gaussian_`. No tensor is changed.
        TypeError: If a tensor is refused. No tensor is changed.
    """
    scale = checks.scale("sigma", sigma)
    asked = getattr(source.add_gaussian_, "__func__", None)  # a subclass or wrapper has another one
    if scale != 0.0 and isinstance(source, SystemNoise) and asked is _PLAIN:
        return source._add(checks.targets(sums, scale), scale, divisor, out_of_place=out_of_place)
    source.add_gaussian_(sums, sigma)
    if out_of_place:
        return list(torch._foreach_div(list(sums), divisor))
    torch._foreach_div_(list(sums), divisor)
    return list(sums)
