"""Make a block of rows of correlated noise from fresh noise and past rows, by operations of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# The columns of one product: copies in float64 of all their rows take half a megabyte and stay in the cache.
_COLUMNS = 2**11


class Block(NamedTuple):
    """This tuple says which rows of a ring are made from which.

    Attributes:
        ring: The rows, ``[rows, values]``; row 0 follows the last row.
        tail: Weights of earlier rows, latest row first.
        first: Index of the first new row.
        ahead: Number of new rows.
        known: Number of rows before row ``first`` that hold past noise.
    """

    ring: Tensor
    tail: Sequence[float]
    first: int
    ahead: int
    known: int

    def new(self) -> list[int]:
        """Return the indices of the new rows."""
        return [(self.first + k) % len(self.ring) for k in range(self.ahead)]

    def past(self) -> list[int]:
        """Return the indices of the rows that hold past noise, oldest first."""
        return [index % len(self.ring) for index in range(self.first - self.known, self.first)]


def correlate(block: Block) -> None:
    """Subtract the weighted earlier rows from each new row, which holds fresh noise.

    On a CPU matrix products in float64 read each past row once for all new rows. No setting of PyTorch lowers the
    precision of such products, also not autocast. Other devices may have no float64, and compute row by row.
    """
    if block.ring.device.type == "cpu":
        _correlate_by_product(block)
    else:
        correlate_by_torch(*block)


def _correlate_by_product(block: Block) -> None:
    ring, new, past = block.ring, block.new(), block.past()
    # An index of all rows would read those that nothing was written to, which may hold NaN.
    rows = torch.tensor(past + new, device="cpu")
    places = torch.tensor(new, device="cpu")
    matrix = _matrix(tuple(block.tail), block.ahead, block.known)
    for start in range(0, ring.shape[1], _COLUMNS):
        columns = ring[:, start : start + _COLUMNS]
        made = matrix @ columns.index_select(0, rows).double()
        columns.index_copy_(0, places, made.to(ring.dtype))


@lru_cache(8)
def _matrix(tail: tuple[float, ...], ahead: int, known: int) -> Tensor:
    """Return the weights of past rows and of fresh noise in each new row, ``[ahead, known + ahead]``."""
    made: list[list[float]] = []
    for k in range(ahead):
        row = [float(index == known + k) for index in range(known + ahead)]
        for lag, weight in enumerate(tail[: k + known], start=1):
            if lag > k:
                row[known + k - lag] -= weight
            else:
                row = [one - weight * other for one, other in zip(row, made[k - lag], strict=True)]
        made.append(row)
    with torch.inference_mode(False):
        return torch.tensor(made, dtype=torch.float64, device="cpu")


def correlate_by_torch(
    ring: Tensor, tail: Sequence[float], first: int, ahead: int, known: int
) -> None:
    """Subtract the weighted earlier rows from each of ``ahead`` rows, beginning with row ``first`` of the ring.

    The code adds whole rows, since PyTorch's settings may lower the precision of a matrix product in float32.

    Args:
        ring: The rows, ``[rows, values]``; row 0 follows the last row.
        tail: Weights of earlier rows, latest row first.
        first: Index of the first row to change.
        ahead: Number of rows to change.
        known: Number of rows before row ``first`` that hold past noise.
    """
    for k in range(ahead):
        row = ring[(first + k) % len(ring)]
        for lag, weight in enumerate(tail[: k + known], start=1):
            row.add_(ring[(first + k - lag) % len(ring)], alpha=-weight)
