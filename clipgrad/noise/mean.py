"""The noised mean: noise and the division by the expected batch size, in one pass where the source knows how."""

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
    elsewhere: bool = False,
) -> list[Tensor]:
    """``(sums + N(0, sigma^2)) / divisor``, rounded after the addition and after the division. It uses ``sums`` up.

    On CUDA the division is a product with the divisor's rounded inverse, as PyTorch's own by a number.

    Args:
        source: Draws the noise. One that is no ``SystemNoise``, or adds in a way of its own, is asked to add, and the
            division is a pass of its own.
        sums: Dense tensors, each once. Noise is added in place, but for what a kernel writes elsewhere at once.
        sigma: Standard deviation of the noise on the sums.
        divisor: A public constant.
        elsewhere: Return other tensors; else those of ``sums``.

    Raises:
        ValueError: If the noise is refused; see :meth:`NoiseSource.add_gaussian_`. Nothing was written.
        TypeError: Likewise.
    """
    scale = checks.scale("sigma", sigma)
    asked = getattr(source.add_gaussian_, "__func__", None)  # a subclass, or a wrapper, has its own
    if scale != 0.0 and isinstance(source, SystemNoise) and asked is _PLAIN:
        return source._add(checks.targets(sums, scale), scale, divisor, elsewhere=elsewhere)
    source.add_gaussian_(sums, sigma)
    if elsewhere:
        return list(torch._foreach_div(list(sums), divisor))
    torch._foreach_div_(list(sums), divisor)
    return list(sums)
