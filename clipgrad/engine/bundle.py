"""Concatenate small per-sample gradients in one matrix, so that one norm and one product replace many."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from clipgrad._functorch import expected
from clipgrad.kernels.selection import select_rows
from clipgrad.rules.canonical import PerSample
from clipgrad.rules.row_norms import row_norms_squared

# Up to this number of elements (of all samples), copying a gradient costs less than the five operations that it saves.
SMALL = 1 << 16


class Bundle:
    """This class holds per-sample gradients of several parameters of one clipping group.

    Args:
        gradients: ``[B, *shape]`` by the parameter's index, all of one dtype and on one device.
    """

    def __init__(self, gradients: Mapping[int, Tensor]) -> None:
        self._shapes = {index: gradient.shape[1:] for index, gradient in gradients.items()}
        self._rows = torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)
        self._sums: dict[int, Tensor] = {}

    def squared_norms(self) -> Tensor:
        """Return the squared norms of all gradients together, ``[B]``."""
        return row_norms_squared(self._rows)

    @property
    def indices(self) -> list[int]:
        """Return the indices of the parameters."""
        return list(self._shapes)

    def weighted_sum(self, index: int, factors: Tensor) -> Tensor:
        """Return ``sum_b factors[b] g_b`` of one parameter. The first call computes all sums, with its factors."""
        if not self._sums:
            total = PerSample(self._rows).weighted_sum(factors)
            parts = total.split([prod(shape) for shape in self._shapes.values()])
            for (at, shape), part in zip(self._shapes.items(), parts, strict=True):
                # Each sum gets its own memory, so that writing to or saving one sum does not affect the others.
                self._sums[at] = part.clone().view(shape)
        return self._sums[index]

    def select(self, keep: Tensor) -> None:
        """Make the gradient of every sample outside the mask exactly zero."""
        self._rows = select_rows(self._rows, keep)
        self._sums = {}


def make_bundle(gradients: Mapping[int, Tensor]) -> Bundle | None:
    """Bundle the small gradients of a clipping group that have the dtype and device of the first small gradient.

    Return None if fewer than two gradients qualify.
    """
    small: dict[int, Tensor] = {}
    for index, gradient in gradients.items():
        # A graph for every number of rows keeps the choice for the expected number.
        elements = expected(gradient.shape[0]) * prod(gradient.shape[1:])
        if gradient.dim() < 2 or not 0 < elements <= SMALL:
            continue
        kind = gradient.dtype, gradient.device
        first = next(iter(small.values()), gradient)
        if kind == (first.dtype, first.device) and gradient.dtype in (torch.float32, torch.float64):
            small[index] = gradient
    return Bundle(small) if len(small) > 1 else None
