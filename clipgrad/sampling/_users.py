"""This file holds ``UserSampler``, which makes batches of users, each with indices of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._trials import random_subset


class UserSampler(PoissonSampler):
    """This sampler makes Poisson batches of users; :func:`user_loader` makes the sampler and a loader for it.

    Each user is in each batch with the same probability, independently of all other users, with all of its samples or a
    random subset. An element of the batch is a user, so each user's gradient is clipped and each user is protected,
    whatever the number of its samples. ``clipgrad.DPOptimizer(..., keep_batch_dim=False)`` passes the loss one user's
    samples. The sampling scheme and the sizes that this class shares with :class:`PoissonSampler` count users.

    Args:
        user_ids: The user of each sample, in the order of the dataset: a tensor, an array or a sequence of hashable
            values.
        expected_users: Mean number of users in a batch; give it or ``sample_rate``.
        sample_rate: Probability q of each user to be in a batch, ``0 < q <= 1``.
        samples_per_user: The largest number of samples of a user in a batch, chosen anew each time, uniformly and
            without replacement; None for all samples.
        max_users: The largest number of users in a batch: see ``max_batch_size`` of :class:`PoissonSampler`.
        bands: Number of groups of users that have their turn one after the other; see :class:`PoissonSampler`.
        steps: Batches per iteration; see :class:`PoissonSampler`.
        rank: Index of the share of the users to sample from.
        num_replicas: Number of shares.
        whole_run: See :class:`PoissonSampler`.
        generator: A generator for repeatable, NOT PRIVATE batches.

    Raises:
        ValueError: If a number is out of range, or a sample has no user.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> sampler = UserSampler(["ann", "bob", "ann", "eve"], sample_rate=1.0, steps=1)
        >>> sampler.num_users, sampler.width
        (3, 2)
        >>> list(sampler)
        [[[0, 2], [1], [3]]]
    """

    def __init__(
        self,
        user_ids: Sequence[Any] | Tensor,
        *,
        expected_users: float | None = None,
        sample_rate: float | None = None,
        samples_per_user: int | None = None,
        max_users: int | None = None,
        bands: int | None = None,
        steps: int | None = None,
        rank: int | None = None,
        num_replicas: int | None = None,
        whole_run: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._samples = _by_user(user_ids)
        if (expected_users is None) == (sample_rate is None):
            raise ValueError(
                f"expected_users and sample_rate are {expected_users} and {sample_rate}; give "
                "exactly one of them, the other follows."
            )
        if expected_users is not None:
            arguments.within("expected_users", expected_users, self.num_users)
        if max_users is not None:
            arguments.count("max_users", max_users)
        largest = max(map(len, self._samples))
        self._width = largest
        if samples_per_user is not None:
            self._width = min(arguments.count("samples_per_user", samples_per_user), largest)
        super().__init__(
            self.num_users,
            expected_batch_size=expected_users,
            sample_rate=sample_rate,
            max_batch_size=max_users,
            bands=bands,
            steps=steps,
            rank=rank,
            num_replicas=num_replicas,
            whole_run=whole_run,
            generator=generator,
        )

    @property
    def num_users(self) -> int:
        """Return the number of users."""
        return len(self._samples)

    @property
    def width(self) -> int:
        """Return the largest number of samples of a user in a batch."""
        return self._width

    @property
    def num_samples(self) -> int:
        """Return the number of samples of all users together."""
        return sum(map(len, self._samples))

    def first_user(self) -> list[int]:
        """Return indices of samples of the first user, as many as a batch may hold."""
        return self._samples[0][: self._width]

    def __iter__(self) -> Iterator[list[list[int]]]:  # type: ignore[override]
        """Yield the batches of one iteration; right after :meth:`load_state_dict`, the rest of the saved iteration."""
        for users in super().__iter__():
            yield [self._some_of(self._samples[user]) for user in users]

    def _some_of(self, samples: list[int]) -> list[int]:
        if len(samples) <= self._width:
            return samples
        chosen = random_subset(len(samples), self._width, self._words)
        return [samples[i] for i in chosen.tolist()]


def _by_user(user_ids: Any) -> list[list[int]]:
    """Return the indices of each user's samples, with users in the order in which they appear."""
    ids = user_ids.tolist() if hasattr(user_ids, "tolist") else list(user_ids)
    if not ids:
        raise ValueError("user_ids is empty; give the user of every sample of the dataset.")
    users: dict[Any, list[int]] = {}
    for index, user in enumerate(ids):
        if user is None or user != user:  # each NaN would count as a user of its own
            raise ValueError(
                f"user_ids[{index}] is {user}, so sample {index} belongs to no user; give every "
                "sample a user, or leave it out of the dataset."
            )
        try:
            users.setdefault(user, []).append(index)
        except TypeError as error:
            raise TypeError(
                f"user_ids[{index}] is a {type(user).__name__}, which is not hashable; give one "
                "value per sample, such as an integer or a string."
            ) from error
    return list(users.values())
