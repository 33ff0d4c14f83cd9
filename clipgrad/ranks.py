"""Who trains together: how processes add up norms and sums, and which of them noises which part.

There is one process today. ``clipgrad.distributed`` will bring the others.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The processes that train one model."""

    def squared_norms(self, own: Tensor) -> Tensor:
        """Squared norms ``[B]`` of whole gradients, from those of the parameters that this process holds."""
        ...

    def own_share(self, sums: list[Tensor]) -> list[Tensor]:
        """The total over all processes, of the coordinates that this process noises; uses up ``sums``."""
        ...

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """Noised means in the form of the parameters that this process steps, from everybody's share."""
        ...


class OneProcess:
    """A process that trains alone: its norms, sums and noise are the whole."""

    def squared_norms(self, own: Tensor) -> Tensor:
        """The norms as they are."""
        return own

    def own_share(self, sums: list[Tensor]) -> list[Tensor]:
        """All sums."""
        return sums

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """All means."""
        return means
