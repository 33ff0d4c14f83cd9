"""The noised mean of a step, from noise that is drawn afresh; the seam for noise that remembers earlier steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clipgrad.noise import checks
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.system import SystemNoise

_PLAIN = SystemNoise.add_gaussian_


class StepNoise(Protocol):
    """What makes the noise of one step out of independent draws, and may keep state from step to step.

    Attributes:
        source: Where independent draws come from.
        accounting: Names how an accountant has to treat the steps. A plan refuses noise of another kind.
    """

    source: NoiseSource
    accounting: str

    def next(
        self, sums: list[Tensor], step: int, *, sigma: float, divisor: float, in_place: bool
    ) -> list[Tensor]:
        """``(sums + noise of this step) / divisor``; uses up ``sums``."""
        ...

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add independent noise to counts in place."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, the source's state included."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved step."""
        ...


class IndependentNoise:
    """Every step draws its own ``N(0, sigma^2)``: the Gaussian mechanism, step by step.

    Args:
        source: Where the draws come from.
    """

    accounting = "independent"

    def __init__(self, source: NoiseSource) -> None:
        self.source = source

    def next(
        self, sums: list[Tensor], step: int, *, sigma: float, divisor: float, in_place: bool
    ) -> list[Tensor]:
        """``(sums + N(0, sigma^2)) / divisor``, whatever the step.

        Args:
            sums: Clipped sums, which are used up.
            step: Number of the step, from 0.
            sigma: Standard deviation of the noise on the sums.
            divisor: A public constant.
            in_place: Return the tensors of ``sums``; else others, since ``sums`` alias memory of somebody else.
        """
        return noised_mean(self.source, sums, sigma, divisor, elsewhere=not in_place)

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add ``N(0, sigma^2)`` to counts in place."""
        self.source.add_gaussian_(counts, sigma)

    def state_dict(self) -> dict[str, Any]:
        """The source's state: no step depends on an earlier one."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the source's state."""
        self.source.load_state_dict(state)


def noised_mean(
    source: NoiseSource,
    sums: Sequence[Tensor],
    sigma: float,
    divisor: float,
    *,
    elsewhere: bool = False,
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
        elsewhere: Return new tensors instead of the tensors of ``sums``.

    Raises:
        ValueError: If the noise is refused; see :meth:`NoiseSource.add_gaussian_`. No tensor is changed.
        TypeError: If a tensor is refused. No tensor is changed.
    """
    scale = checks.scale("sigma", sigma)
    asked = getattr(source.add_gaussian_, "__func__", None)  # a subclass or wrapper has another one
    if scale != 0.0 and isinstance(source, SystemNoise) and asked is _PLAIN:
        return source._add(checks.targets(sums, scale), scale, divisor, elsewhere=elsewhere)
    source.add_gaussian_(sums, sigma)
    if elsewhere:
        return list(torch._foreach_div(list(sums), divisor))
    torch._foreach_div_(list(sums), divisor)
    return list(sums)
