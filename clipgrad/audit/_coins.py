"""Choose which samples are canaries and which of them are trained on; an audit has no other randomness."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def coin_flips(m: int) -> NDArray[np.bool_]:
    """Return independent fair coins from the operating system's generator.

    Args:
        m: Number of coins, at least 1.

    Returns:
        Boolean ``[m]``. The coins cannot be repeated: with a seed an adversary could know them.

    Raises:
        ValueError: If ``m`` is not a positive integer.

    Examples:
        >>> coin_flips(3).shape
        (3,)
    """
    if type(m) is not int or m < 1:
        raise ValueError(f"m must be a positive integer, got {m!r}.")
    octets = np.frombuffer(secrets.token_bytes((m + 7) // 8), dtype=np.uint8)
    return np.unpackbits(octets, count=m).astype(np.bool_)


def order_of_ties(m: int) -> NDArray[np.int64]:
    """Return a fixed random order of ``m`` canaries for equal scores, since their own order may depend on the coins."""
    return np.random.default_rng(m).permutation(m)


@dataclass(frozen=True, eq=False, repr=False)
class Canaries:
    """This class holds canaries and their coins.

    The coins decide which canaries are trained on, and :func:`~clipgrad.audit.lower_bound` needs them again. Nothing in
    between may use them: neither the scores nor a choice of hyperparameters.

    Attributes:
        indices: Positions of the canaries in the dataset, ``[m]``, without repetition.
        included: Boolean ``[m]``, true for canaries that are trained on.

    Examples:
        >>> canaries = Canaries.draw(range(90, 100))
        >>> kept = canaries.training_indices(100)
        >>> kept[:90] == list(range(90)), len(kept) - 90 == int(canaries.included.sum())
        (True, True)
        >>> canaries
        Canaries(m=10)
    """

    indices: NDArray[np.int64]
    included: NDArray[np.bool_]

    def __post_init__(self) -> None:
        indices = np.array(self.indices)
        included = np.array(self.included)
        if indices.ndim != 1 or not len(indices) or not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(
                f"indices must be a non-empty sequence of integers, got {self.indices!r}."
            )
        if len(np.unique(indices)) < len(indices) or indices.min() < 0:
            raise ValueError(
                "indices must be positions in the dataset, at least 0, each once: a sample has one coin."
            )
        if included.shape != indices.shape or included.dtype != np.bool_:
            raise ValueError(
                f"included must be boolean of shape {indices.shape}, got {included.dtype} of shape "
                f"{included.shape}; Canaries.draw(indices) makes it."
            )
        # These are copies, so that the caller cannot change the coins later. PyTorch refuses read-only arrays.
        object.__setattr__(self, "indices", indices.astype(np.int64))
        object.__setattr__(self, "included", included)

    @classmethod
    def draw(cls, indices: Sequence[int] | NDArray[Any]) -> Canaries:
        """Flip a coin for each sample at ``indices``.

        Args:
            indices: Positions in the dataset. Choose them, and the samples there, without looking at coins that were
                flipped before.

        Raises:
            ValueError: If ``indices`` is empty, or not distinct integers of at least 0.
        """
        where = np.asarray(indices)
        return cls(where, coin_flips(max(1, where.size)))

    def training_indices(self, num_samples: int) -> list[int]:
        """Return all positions of a dataset except those of excluded canaries, for ``Subset``.

        Args:
            num_samples: Size of the dataset, canaries included.

        Returns:
            Positions in increasing order.

        Raises:
            ValueError: If a canary lies outside the dataset.
        """
        if self.indices.max() >= num_samples:
            raise ValueError(
                f"num_samples must exceed the largest index, {self.indices.max()}, got {num_samples}."
            )
        kept = np.ones(num_samples, dtype=np.bool_)
        kept[self.indices[~self.included]] = False
        positions: list[int] = np.flatnonzero(kept).tolist()
        return positions

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Canaries(m={len(self)})"  # the coins must not appear in a log
