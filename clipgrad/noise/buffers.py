"""Make rows of correlated noise from decaying sums of all earlier rows, on one device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipgrad.noise.source import NoiseSource


class Buffers:
    """Row t is ``z_t - sum_j weights[j] s_j``. Each buffer ``s_j`` then becomes ``decays[j] s_j + row_t``.

    Args:
        weights: Weights of the buffers.
        decays: Decays of the buffers.
        past: Buffers after an earlier step; empty before the first step.
        shapes: Shapes of the tensors that share a row, in their order in the row.
        like: A tensor with the device and dtype of the rows.
    """

    def __init__(
        self,
        weights: Sequence[float],
        decays: Sequence[float],
        past: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        like: Tensor,
    ) -> None:
        self._weights, self._decays = list(weights), list(decays)
        with torch.inference_mode(False):
            size = sum(map(math.prod, shapes))
            self._row = torch.zeros(size, dtype=like.dtype, device=like.device)
            self._sums = [buffer.clone() for buffer in past]
            if not past:
                self._sums = [torch.zeros_like(self._row) for _ in weights]
        parts = self._row.split([math.prod(shape) for shape in shapes])
        self._views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def next(self, source: NoiseSource, scale: float) -> list[Tensor]:
        """Return the row of the next step as one tensor for each shape; the next call overwrites them."""
        row = self._row.zero_()
        source.add_gaussian_([row], scale)
        for weight, buffer in zip(self._weights, self._sums, strict=True):
            row.add_(buffer, alpha=-weight)
        for decay, buffer in zip(self._decays, self._sums, strict=True):
            buffer.mul_(decay).add_(row)
        return self._views

    def past(self) -> list[Tensor]:
        """Return the buffers."""
        return self._sums
