"""Keep clipped sums in the host's memory, so that a comparison takes little of the device's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from clipgrad.ranks import OneProcess


class SumsOnHost(OneProcess):
    """This class adds up the clipped sums of several microbatches on the host, one parameter at a time.

    Attributes:
        totals: The sums so far, in order.
    """

    sums_leave = True

    def __init__(self) -> None:
        self.totals: list[Tensor] = []

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Add sums to ``totals``, and return none."""
        first = not self.totals
        for index, total in enumerate(totals):
            if first:
                self.totals.append(total.to("cpu", copy=True))
            else:
                self.totals[index].add_(total.cpu())
        return []
