"""Make loaders: each function combines a dataset, a sampler and a collate function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from clipgrad.plan import PrivacyPlan
from clipgrad.ranks import world
from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._collate import EmptyBatchCollate, UserCollate, padded
from clipgrad.sampling._loader import PrivateLoader
from clipgrad.sampling._planned import bands_of, numbers_of_plan, require_fit
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._shuffled import ShuffledSampler
from clipgrad.sampling._users import UserSampler


def poisson_loader(
    dataset: Dataset[Any],
    *,
    plan: PrivacyPlan | None = None,
    expected_batch_size: float | None = None,
    sample_rate: float | None = None,
    max_batch_size: int | None = None,
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
    """Make a loader of Poisson batches, including empty batches.

    Args:
        dataset: A map-style dataset; its first sample determines the structure of an empty batch.
        plan: A :class:`clipgrad.PrivacyPlan` for this dataset. It replaces ``expected_batch_size``, ``sample_rate``,
            ``max_batch_size`` and ``steps``, and one iteration is then the whole run.
        expected_batch_size: Mean size of a batch; see :class:`PoissonSampler`.
        sample_rate: Probability of each sample to be in a batch.
        max_batch_size: The largest number of samples in a batch.
        pad: Whether to fill all batches up to ``max_batch_size`` rows and yield :class:`PaddedBatch`, for graphs of one
            fixed size.
        steps: Batches per iteration; see :class:`PoissonSampler`.
        rank: Index of the share of the dataset to sample from.
        num_replicas: Number of shares.
        generator: A generator for repeatable, NOT PRIVATE batches.
        collate_fn: See :class:`EmptyBatchCollate`.
        num_workers: As in ``DataLoader``.
        pin_memory: As in ``DataLoader``.
        persistent_workers: As in ``DataLoader``.
        prefetch_factor: As in ``DataLoader``.

    Returns:
        The loader; its ``batch_sampler`` is the :class:`PoissonSampler`.

    Raises:
        ValueError: If the sampler's arguments are out of range or the dataset is empty.
        TypeError: If the dataset has no length, or no empty batch can be made.

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(100, 3), torch.arange(100))
        >>> loader = poisson_loader(data, expected_batch_size=0.5, steps=2)
        >>> [x.shape[1:] == (3,) and len(x) == len(y) for x, y in loader]  # often both are empty
        [True, True]
        >>> loader = poisson_loader(data, sample_rate=0.1, max_batch_size=16, pad=True, steps=2)
        >>> for batch, is_padding in loader:  # optimizer.backward(*batch, is_padding=is_padding)
        ...     print([tuple(leaf.shape) for leaf in batch], tuple(is_padding.shape))
        [(16, 3), (16,)] (16,)
        [(16, 3), (16,)] (16,)
    """
    if plan is not None:
        given = (expected_batch_size, sample_rate, max_batch_size, steps)
        expected_batch_size, max_batch_size, steps = numbers_of_plan(
            plan, "sample", arguments.length(dataset), given
        )
    sampler = PoissonSampler(
        arguments.length(dataset),
        expected_batch_size=expected_batch_size,
        sample_rate=sample_rate,
        max_batch_size=max_batch_size,
        bands=bands_of(plan),
        steps=steps,
        rank=rank,
        num_replicas=num_replicas,
        whole_run=plan is not None,
        generator=generator,
    )
    example = dataset[0]
    return PrivateLoader(
        dataset,
        sampler,
        collate_fn=padded(
            pad, "max_batch_size", max_batch_size, example, EmptyBatchCollate(example, collate_fn)
        ),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        prefetch_factor=prefetch_factor,
        receipts=None if plan is None else plan.run.receipts,
    )


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
        num_workers: As in ``DataLoader``.
        pin_memory: As in ``DataLoader``.
        persistent_workers: As in ``DataLoader``.
        prefetch_factor: As in ``DataLoader``.

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


def shuffled_loader(
    dataset: Dataset[Any],
    *,
    plan: PrivacyPlan,
    generator: torch.Generator | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    num_workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
) -> PrivateLoader:
    """Make a loader of shuffled batches for a plan with ``shuffled=True``; each sample is used at most once a pass.

    One iteration is the whole run, over as many passes as the plan's steps need. If the plan has a ``mechanism``, all
    passes have the same order, which is drawn once.

    Args:
        dataset: A map-style dataset.
        plan: A :class:`clipgrad.PrivacyPlan` for this dataset with ``shuffled=True``.
        generator: A generator for a repeatable order.
        collate_fn: Makes a batch of samples.
        num_workers: As in ``DataLoader``.
        pin_memory: As in ``DataLoader``.
        persistent_workers: As in ``DataLoader``.
        prefetch_factor: As in ``DataLoader``.

    Raises:
        ValueError: If the plan is for other batches or another dataset.

    Examples:
        >>> import clipgrad
        >>> plan = clipgrad.PrivacyPlan(
        ...     num_samples=10,
        ...     expected_batch_size=4,
        ...     steps=3,
        ...     delta=1e-2,
        ...     noise_multiplier=1.0,
        ...     shuffled=True,
        ...     relation="replace_one",
        ... )
        >>> data = torch.utils.data.TensorDataset(torch.zeros(10, 3))
        >>> [len(x) for (x,) in shuffled_loader(data, plan=plan)]
        [4, 4, 4]
    """
    count = arguments.length(dataset)
    if (processes := world()[1]) > 1:
        raise ValueError(
            f"shuffled_loader makes the batches of one process, but there are {processes}, whose orders would not fit "
            "together. Use poisson_loader, whose parts for the ranks are one Poisson sample."
        )
    require_fit(plan, "sample", count, shuffled=True)
    sampler = ShuffledSampler(
        count,
        batch_size=int(plan.expected_batch_size),
        steps=plan.steps,
        fixed_order=plan.mechanism is not None,
        generator=generator,
    )
    return PrivateLoader(
        dataset,
        sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        prefetch_factor=prefetch_factor,
        receipts=plan.run.receipts,
    )


class _ByUser(Dataset[list[Any]]):
    """This dataset maps a list of indices to a list of samples."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self._samples = samples

    def __getitem__(self, indices: list[int]) -> list[Any]:
        return [self._samples[index] for index in indices]
