"""This module makes the noised mean of a step. Noise that depends on earlier steps can be added here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipgrad.noise import checks
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.system import is_plain_system_noise


class StepSums(NamedTuple):
    """This tuple holds the clipped sums of a step, and says which noise and division they get.

    Attributes:
        sums: Clipped sums, one tensor for each parameter; on several processes, of one bucket at a time. They may be
            overwritten.
        number: Number of the step, from 0.
        names: Names of the parameters, or of the coordinates in each part.
        sigma: Standard deviation of the noise on the sums. For correlated noise it is the deviation of the independent
            noise, for a matrix whose columns have norm 1.
        divisor: A public constant.
        in_place: Whether the result is written into ``sums``. False is for sums that alias a CUDA graph's memory.
    """

    sums: list[Tensor]
    number: int
    names: Sequence[str]
    sigma: float
    divisor: float
    in_place: bool


class StepNoise(Protocol):
    """This protocol makes the noise of one step from independent noise, and may keep state from step to step.

    Attributes:
        source: The source of independent noise.
        accounting: Name of the accounting that the steps need. A plan refuses noise of another kind.
        secret: Why a state must stay secret; empty if it need not.
        needs_all_sums: Whether one call must get all sums of a step, with names, since each coordinate has a state of
            its own.
    """

    source: NoiseSource
    accounting: str
    secret: str
    needs_all_sums: bool

    def next(self, step: StepSums) -> list[Tensor]:
        """Return ``(sums + noise of this step) / divisor``."""
        ...

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add independent noise to counts in place."""
        ...

    def change_source(self, source: NoiseSource) -> None:
        """Take independent noise from another source."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, including the source's state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step at which the state was saved."""
        ...


class StepOfNoise(NamedTuple):
    """This function makes noised means of one step's sums, all at once or part by part.

    Attributes:
        noise: The noise.
        number: Number of the step, from 0.
        sigma: Standard deviation, as in ``StepSums``.
        divisor: A public constant.
    """

    noise: StepNoise
    number: int
    sigma: float
    divisor: float

    @property
    def needs_all_sums(self) -> bool:
        """Return whether the noise must get all sums of the step in one call."""
        return self.noise.needs_all_sums

    def __call__(
        self, sums: list[Tensor], names: Sequence[str], /, *, in_place: bool
    ) -> list[Tensor]:
        """Return ``(sums + noise) / divisor``."""
        return self.noise.next(
            StepSums(sums, self.number, names, self.sigma, self.divisor, in_place)
        )


class IndependentNoise:
    """This class adds independent ``N(0, sigma^2)`` at each step: the Gaussian mechanism.

    Args:
        source: The source of the noise.
    """

    accounting = "independent"
    secret = ""
    needs_all_sums = False

    def __init__(self, source: NoiseSource) -> None:
        self.source = source

    def next(self, step: StepSums) -> list[Tensor]:
        """Return ``(sums + N(0, sigma^2)) / divisor``; number and names have no effect."""
        return noised_mean(
            self.source, step.sums, step.sigma, step.divisor, out_of_place=not step.in_place
        )

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Add ``N(0, sigma^2)`` to counts in place."""
        self.source.add_gaussian_(counts, sigma)

    def change_source(self, source: NoiseSource) -> None:
        """Take noise from another source."""
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        """Return the source's state; no step depends on an earlier step."""
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
    if scale != 0.0 and is_plain_system_noise(source):
        return source._add(checks.targets(sums, scale), scale, divisor, out_of_place=out_of_place)
    source.add_gaussian_(sums, sigma)
    if out_of_place:
        return list(torch._foreach_div(list(sums), divisor))
    torch._foreach_div_(list(sums), divisor)
    return list(sums)
