"""This module says how processes add up norms and sums, and which process adds noise to which part.

It supports one process. ``clipgrad.distributed`` will add several.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """This protocol represents the processes that train one model."""

    def squared_norms(self, own: Tensor) -> Tensor:
        """Return the squared norms ``[B]`` of whole gradients, from those of this process's parameters."""
        ...

    def own_share(self, sums: list[Tensor]) -> list[Tensor]:
        """Return the total over all processes of the coordinates that this process adds noise to.

        The tensors of ``sums`` may be overwritten.
        """
        ...

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """Return the noisy means of this process's parameters, from the shares of all processes."""
        ...


class OneProcess:
    """This class represents a process that trains alone."""

    def squared_norms(self, own: Tensor) -> Tensor:
        """Return the norms unchanged."""
        return own

    def own_share(self, sums: list[Tensor]) -> list[Tensor]:
        """Return the sums unchanged."""
        return sums

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """Return the means unchanged."""
        return means
