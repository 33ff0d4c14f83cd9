"""Add rows to a microbatch, for a graph that has more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipgrad.compiled.lengths import shapes_of, with_rows
from clipgrad.compiled.shape import pad_batch, pad_mask


class WithAddedRows:
    """This class holds a microbatch, and the same microbatch with more rows.

    Args:
        batch: The leaves of the microbatch.
        mask: Boolean mask of the samples that the caller marked as padding; None without padding.
        count: The number of rows of the microbatch.
        size: The number of rows with those that are added.
        device: The device of ``padding``.

    Attributes:
        batch: The leaves of the microbatch, as they were given.
        size: The number of rows with those that are added.
        fitted: The leaves without added rows, with the strides for which graphs are compiled.
        padding: Boolean mask ``[size]``, true for padding of the caller and for added rows.
        shapes: The sizes of the leaves with added rows.
    """

    def __init__(
        self,
        batch: Sequence[Any],
        mask: Tensor | None,
        count: int,
        size: int,
        device: torch.device,
    ) -> None:
        self.batch, self.size = batch, size
        self.fitted = pad_batch(batch, count)
        self.padding = pad_mask(mask, count, size, device)
        self.shapes = with_rows(shapes_of(batch), size)

    @cached_property
    def padded(self) -> list[Any]:
        """Return copies of the leaves with added rows; a recording needs none, since it adds the rows itself."""
        return pad_batch(self.fitted, self.size)
