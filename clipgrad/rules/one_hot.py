"""This module holds factors whose rows are one-hot, as an embedding has, by the positions of the ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """This class holds a factor ``[B, S, width]`` of one-hot rows, stored as the positions of the ones.

    Attributes:
        ids: ``[B, S]``, integers in ``[0, width)``.
        width: Number of columns.
    """

    ids: Tensor
    width: int

    def per_sample(self, right: Tensor) -> Tensor:
        """Return each sample's sum of outer products with ``right`` ``[B, S, columns]``, ``[B * width, columns]``."""
        samples = self.ids.shape[0]
        flat = self.ids + self.width * torch.arange(samples, device=self.ids.device)[:, None]
        total = right.new_zeros(samples * self.width, right.shape[-1])
        return total.index_add_(0, flat.flatten(), right.flatten(0, 1))

    def add_to(self, total: Tensor, right: Tensor) -> Tensor:
        """Add outer products with ``right`` ``[B, S, columns]`` of all samples to ``total`` ``[width, columns]``.

        Only rows of ``total`` at the ids are read and written, in place.
        """
        return total.index_add_(0, self.ids.flatten(), right.flatten(0, 1).to(total.dtype))
