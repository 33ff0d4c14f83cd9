"""Make loaders of samples: each function combines a dataset, a sampler and a collate function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from clipgrad.plan import PrivacyPlan
from clipgrad.ranks import world
from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._collate import EmptyBatchCollate, padded
from clipgrad.sampling._loader import PrivateLoader
from clipgrad.sampling._mixing import refuse_mixing
from clipgrad.sampling._planned import bands_of, numbers_of_plan, require_fit
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._shuffled import ShuffledSampler


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
        num_workers: See ``torch.utils.data.DataLoader``.
        pin_memory: See ``torch.utils.data.DataLoader``.
        persistent_workers: See ``torch.utils.data.DataLoader``.
        prefetch_factor: See ``torch.utils.data.DataLoader``.

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
    refuse_mixing(dataset, arguments.length(dataset), collate_fn)
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
        num_workers: See ``torch.utils.data.DataLoader``.
        pin_memory: See ``torch.utils.data.DataLoader``.
        persistent_workers: See ``torch.utils.data.DataLoader``.
        prefetch_factor: See ``torch.utils.data.DataLoader``.

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
    refuse_mixing(dataset, count, collate_fn)
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
