"""Describe the matrix C and the independent noise Z of a run, in the form that ``clipgrad.noise`` needs."""

from __future__ import annotations

from typing import NamedTuple

from clipgrad.factorisation.toeplitz import Array, column_norm


class Strategy(NamedTuple):
    """This tuple describes a lower-triangular Toeplitz matrix C and the standard deviation of the noise Z.

    A banded C has no ``weights``: row t is ``z_t - sum_i column[i] row_{t-i}``. Otherwise C has the entries
    ``sum_j weights[j] decays[j]^(i-1)`` below its diagonal. Then row t is ``z_t - sum_j weights[j] s_j``, and each
    buffer becomes ``decays[j] s_j + row t``.

    Attributes:
        column: First column of C, which begins with 1.
        scale: Standard deviation of Z for a noise multiplier and a sensitivity of 1.
        weights: Weights of the buffers.
        decays: Decays of the buffers, between 0 and 1.
    """

    column: tuple[float, ...]
    scale: float
    weights: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()

    @property
    def kept(self) -> int:
        """Return the number of tensors, each of a row's size, that the noise keeps between steps."""
        return len(self.weights) or len(self.column) - 1


def banded(column: Array) -> Strategy:
    """Return the strategy for runs in which two steps of one sample are at least ``len(column)`` steps apart."""
    return Strategy(tuple(column.tolist()), column_norm(column))
