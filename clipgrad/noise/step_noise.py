"""This module makes the noise of a step. Noise that depends on earlier steps can be added here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from clipgrad.noise.mean import noised_mean
from clipgrad.noise.source import NoiseSource


class StepNoise(Protocol):
    """This protocol makes the noise of one step from independent noise, and may keep state from step to step.

    Attributes:
        source: The source of independent noise.
        accounting: Name of the accounting that the steps need. A plan refuses noise of another kind.
    """

    source: NoiseSource
    accounting: str

    def next(
        self, sums: list[Tensor], step: int, *, sigma: float, divisor: float, in_place: bool
    ) -> list[Tensor]:
        """Return ``(sums + noise of this step) / divisor``; ``sums`` may be overwritten."""
        ...

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add independent noise to counts in place."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, including the source's state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step at which the state was saved."""
        ...


class IndependentNoise:
    """This class adds independent ``N(0, sigma^2)`` at each step: the Gaussian mechanism.

    Args:
        source: The source of the noise.
    """

    accounting = "independent"

    def __init__(self, source: NoiseSource) -> None:
        self.source = source

    def next(
        self, sums: list[Tensor], step: int, *, sigma: float, divisor: float, in_place: bool
    ) -> list[Tensor]:
        """Return ``(sums + N(0, sigma^2)) / divisor``.

        Args:
            sums: Clipped sums, which may be overwritten.
            step: Number of the step, from 0; it has no effect.
            sigma: Standard deviation of the noise on the sums.
            divisor: A public constant.
            in_place: Return the tensors of ``sums``; otherwise new tensors, if ``sums`` alias a CUDA graph's memory.
        """
        return noised_mean(self.source, sums, sigma, divisor, out_of_place=not in_place)

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add ``N(0, sigma^2)`` to counts in place."""
        self.source.add_gaussian_(counts, sigma)

    def state_dict(self) -> dict[str, Any]:
        """Return the source's state; no step depends on an earlier step."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the source's state."""
        self.source.load_state_dict(state)
