"""Make the loader of users, which combines a dataset, a sampler of users and a collate function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from clipgrad.plan import PrivacyPlan
from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._collate import UserCollate, padded
from clipgrad.sampling._loader import PrivateLoader
from clipgrad.sampling._mixing import refuse_mixing
from clipgrad.sampling._planned import bands_of, numbers_of_plan
from clipgrad.sampling._users import UserSampler


def user_loader(
    dataset: Dataset[Any],
    user_ids: Sequence[Any] | Tensor,
    *,
    plan: PrivacyPlan | None = None,
    expected_users: float | None = None,
    sample_rate: float | None = None,
    samples_per_user: int | None = None,
    max_users: int | None = None,
    pad: bool = False,
    steps: int | None = None,
    rank: int | None = None,
    num_replicas: int | None = None,
    generator: torch.Generator | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    num_workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
) -> PrivateLoader:
    """Make a loader of Poisson batches of users, for privacy of whole users.

    A batch is a tuple: the tensors of ``collate_fn``, each ``[B, K, ...]`` for B users with K places for samples, and
    last ``present``, boolean ``[B, K]``. A user's free places hold repetitions, which the loss must leave out. Every
    user has at least one sample.

    Args:
        dataset: A map-style dataset.
        user_ids: The user of each sample; see :class:`UserSampler`.
        plan: A :class:`clipgrad.PrivacyPlan` whose ``num_samples`` is the number of users. It replaces
            ``expected_users``, ``sample_rate``, ``max_users`` and ``steps``.
        expected_users: Mean number of users in a batch.
        sample_rate: Probability of each user to be in a batch.
        samples_per_user: K, the largest number of samples of a user in a batch, chosen uniformly at random each time.
            None takes all samples; K is then the size of the largest user.
        max_users: The largest number of users in a batch.
        pad: Whether to fill all batches up to ``max_users`` and yield :class:`PaddedBatch`.
        steps: Batches per iteration.
        rank: Index of the share of the users to sample from.
        num_replicas: Number of shares.
        generator: A generator for repeatable, NOT PRIVATE batches.
        collate_fn: Collates the samples of all users of a batch at once.
        num_workers: See ``torch.utils.data.DataLoader``.
        pin_memory: See ``torch.utils.data.DataLoader``.
        persistent_workers: See ``torch.utils.data.DataLoader``.
        prefetch_factor: See ``torch.utils.data.DataLoader``.

    Returns:
        The loader; its ``batch_sampler`` is the :class:`UserSampler`.

    Raises:
        ValueError: If an argument is out of range, or the number of ids differs from the number of samples.
        TypeError: If an argument has the wrong type.

    Examples:
        The gradient of a user's mean loss over its samples is clipped as a whole:

        >>> import clipgrad
        >>> data = torch.utils.data.TensorDataset(torch.randn(7, 3), torch.randn(7, 1))
        >>> loader = user_loader(data, [0, 0, 0, 1, 2, 2, 2], expected_users=2, samples_per_user=2)
        >>> def loss_fn(model, x, y, present):  # of one user: [K, 3], [K, 1], [K]
        ...     losses = (model(x) - y).square().mean(-1)
        ...     return losses.where(present, 0).sum() / present.sum()
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = clipgrad.DPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     model,
        ...     loss_fn,
        ...     max_grad_norm=1.0,
        ...     noise_multiplier=1.0,
        ...     expected_batch_size=2,  # users
        ...     keep_batch_dim=False,
        ... )
        >>> for batch in loader:
        ...     loss = optimizer.backward(*batch)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    if plan is not None:
        given = (expected_users, sample_rate, max_users, steps)
        # The sampler checks the ids with clear messages.
        users = UserSampler(user_ids, sample_rate=1.0).num_users
        expected_users, max_users, steps = numbers_of_plan(plan, "user", users, given)
    sampler = UserSampler(
        user_ids,
        expected_users=expected_users,
        sample_rate=sample_rate,
        samples_per_user=samples_per_user,
        max_users=max_users,
        bands=bands_of(plan),
        steps=steps,
        rank=rank,
        num_replicas=num_replicas,
        whole_run=plan is not None,
        generator=generator,
    )
    if sampler.num_samples != arguments.length(dataset):
        raise ValueError(
            f"user_ids has {sampler.num_samples} entries, but the dataset has "
            f"{arguments.length(dataset)} samples; give one user per sample."
        )
    refuse_mixing(dataset, sampler.num_samples, collate_fn)
    by_user = _ByUser(dataset)
    example = by_user[sampler.first_user()]
    collate = UserCollate(example[0], collate_fn, sampler.width)
    return PrivateLoader(
        by_user,
        sampler,
        collate_fn=padded(pad, "max_users", max_users, example, collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        prefetch_factor=prefetch_factor,
        receipts=None if plan is None else plan.run.receipts,
    )


class _ByUser(Dataset[list[Any]]):
    """This dataset maps a list of indices to a list of samples."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self._samples = samples

    def __getitem__(self, indices: list[int]) -> list[Any]:
        return [self._samples[index] for index in indices]
