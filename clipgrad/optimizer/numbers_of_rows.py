"""Refuse a Python number in the batch that is the number of its rows, since every sample sees such a number."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from clipgrad.errors import NotPerSampleError


class NumbersOfRows:
    """This class notices a number that was the number of rows in all batches, two of which differ in size.

    A loss that divides by it has gradients that depend on how many other samples there are.
    """

    def __init__(self) -> None:
        # The number of rows of the first batch for each place of a number; None if the number was once another one.
        self._rows: dict[int, int | None] = {}

    def check(self, batch: Sequence[Any], rows: int) -> None:
        """Look at one flat batch.

        Raises:
            NotPerSampleError: If a number in it follows the number of rows.
        """
        for place, leaf in enumerate(batch):
            if isinstance(leaf, bool) or not isinstance(leaf, numbers.Real):
                continue
            if leaf != rows:
                self._rows[place] = None
                continue
            first = self._rows.setdefault(place, rows)
            if first not in (None, rows):
                raise NotPerSampleError(
                    f"the batch holds the number {leaf}, which is the number of its rows, as it was in a batch of "
                    f"{first}. Each sample's loss would depend on how many others there are, which clipping does not "
                    "bound. Leave it out: the loss is one sample's, and step divides by expected_batch_size."
                )
