"""Describe the matrix C of a run as the noise needs it: how rows follow from earlier rows, and how large Z is."""

from __future__ import annotations

from typing import NamedTuple

from clipgrad.factorisation.toeplitz import Array, column_norm


class Strategy(NamedTuple):
    """A lower-triangular Toeplitz matrix C, and the deviation of the noise Z.

    A banded C has no ``weights``: row t is ``z_t - sum_i column[i] row_{t-i}``. Otherwise C has the entries
    ``sum_j weights[j] decays[j]^(i-1)`` below its diagonal. Then row t is ``z_t - sum_j weights[j] s_j``, and each
    buffer becomes ``decays[j] s_j + row t``.

    Attributes:
        column: First column of C, which begins with 1.
        scale: Deviation of Z for a noise multiplier and a sensitivity of 1.
        weights: Weights of the buffers.
        decays: Decays of the buffers, between 0 and 1.
    """

    column: tuple[float, ...]
    scale: float
    weights: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()

    @property
    def kept(self) -> int:
        """Return how many tensors of the size of a row the noise keeps."""
        return len(self.weights) or len(self.column) - 1


def banded(column: Array) -> Strategy:
    """Return the strategy whose samples take part in steps that are at least ``len(column)`` apart."""
    return Strategy(tuple(column.tolist()), column_norm(column))
