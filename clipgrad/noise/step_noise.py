"""Noise that is drawn afresh at every step; the seam for noise that remembers earlier steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from clipgrad.noise.mean import noised_mean
from clipgrad.noise.source import NoiseSource


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
        return noised_mean(self.source, sums, sigma, divisor, out_of_place=not in_place)

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add ``N(0, sigma^2)`` to counts in place."""
        self.source.add_gaussian_(counts, sigma)

    def state_dict(self) -> dict[str, Any]:
        """The source's state: no step depends on an earlier one."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the source's state."""
        self.source.load_state_dict(state)
