"""Define ``Groups``, which says which samples a step of cyclic Poisson sampling may use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipgrad.sampling._words import Words


def named(numbers: NDArray[Any]) -> str:
    """Return a hash of numbers."""
    return hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()


@dataclass(frozen=True)
class Groups:
    """Each index belongs to one group, and step t samples from group ``t % bands``.

    The group of each index is drawn independently. So the groups of other samples do not depend on whether a sample is
    in the dataset, and the accountant's bound for fixed groups also holds for adding and removing a sample. Groups
    differ in size, so a large group has larger batches on average, but sums are divided by a public constant.

    Attributes:
        bands: Number of groups.
        group: The group of each index.
    """

    bands: int
    group: NDArray[np.int32]

    @classmethod
    def drawn(cls, size: int, bands: int, words: Words) -> Self:
        """Draw a group for each of ``size`` indices; the bound does not need equally probable groups."""
        return cls(bands, (words(size) % np.uint64(bands)).astype(np.int32))

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.group, kind="stable")

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        return np.cumsum([0, *np.bincount(self.group, minlength=self.bands)])

    def of_step(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the group of a step, in ascending order."""
        start, end = self._bounds[step % self.bands : step % self.bands + 2]
        return self._order[start:end]

    @property
    def name(self) -> str:
        """Return a hash of the groups of all indices."""
        return named(self.group)

    def state(self) -> Tensor:
        """Return the groups as a tensor for a checkpoint."""
        return torch.from_numpy(self.group)

    def restored(self, state: Tensor) -> Groups:
        """Return saved groups of the same indices.

        Raises:
            ValueError: If the state has another number of indices or more groups.
        """
        found = np.array(state.cpu().numpy(), dtype=np.int32)
        if found.shape != self.group.shape or (
            found.size and not 0 <= found.min() <= found.max() < self.bands
        ):
            raise ValueError(
                f"state has groups of {found.shape} samples, which do not fit {len(self.group)} samples in "
                f"{self.bands} groups. Construct the sampler with the data, the plan and the number of processes "
                "of the saved sampler."
            )
        return Groups(self.bands, found)
