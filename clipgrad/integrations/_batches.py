"""Split logical batches into the microbatches of loops with gradient accumulation, and count epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset

from clipgrad.plan import PrivacyPlan
from clipgrad.sampling import PrivateLoader, poisson_loader, shuffled_loader, user_loader

SECRET_CHECKPOINTS = (
    "plan has mechanism={mechanism!r}, whose checkpoints hold the noise that was added and must stay secret. The "
    "trainer writes files that others can read. Use clipgrad.save_checkpoint in a loop of your own, or "
    "leave mechanism out."
)
_IGNORED = -100  # Cross entropy leaves out this label.


class LogicalBatches(IterableDataset[Any]):
    """This dataset yields the batches of a run as microbatches, one epoch per iteration.

    A loop that accumulates gradients takes a fixed number of microbatches for each step, and iterates once per epoch.
    One iteration of a plan's loader is the whole run, so each iteration here continues after the previous one.

    Args:
        loader: The loader of the run.
        pieces: Number of microbatches of a batch, of which some may be empty.
        rows: Number of rows of a microbatch; the last one has the rest.
        epoch: Number of batches of an epoch.
        done: Returns the number of batches that an interrupted run has used. It is called at the first iteration. The
            loop skips the used batches of the present epoch, so None is yielded for each of their microbatches.
    """

    def __init__(
        self,
        loader: PrivateLoader,
        *,
        pieces: int,
        rows: int,
        epoch: int,
        done: Callable[[], int],
    ) -> None:
        self._loader, self._done = loader, done
        self._pieces, self._rows, self._epoch = pieces, rows, epoch
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Return the number of microbatches of an epoch."""
        return self._epoch * self._pieces

    def __iter__(self) -> Iterator[Any]:
        """Yield the microbatches of the next epoch."""
        skipped = 0
        if self._batches is None:
            if done := self._done():
                state = self._loader.state_dict()
                if "groups" in state:
                    raise ValueError(
                        f"the training was interrupted after {done} steps, but the groups of its cyclic batches are "
                        "not in the checkpoint, and correlated noise needs the same groups. Train without "
                        "interruption, or with a loop of your own and clipgrad.save_checkpoint."
                    )
                self._loader.load_state_dict({**state, "done": done})
                skipped = done % self._epoch
            self._batches = iter(self._loader)
        yield from repeat(None, skipped * self._pieces)
        for batch in islice(self._batches, self._epoch - skipped):
            yield from cut(batch, self._pieces, self._rows)


class EpochLoader:
    """This loader yields the batches of a plan, one epoch per iteration; its state is the position in the run.

    Args:
        loader: The plan's loader, whose one iteration is the whole run.
        epoch: Number of batches of an epoch.
    """

    def __init__(self, loader: PrivateLoader, epoch: int) -> None:
        self.loader, self._epoch, self._left = loader, epoch, epoch
        self._batches: Iterator[Any] | None = None

    @property
    def dataset(self) -> Any:
        """Return the dataset."""
        return self.loader.dataset

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._epoch

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the next epoch, or the rest of an interrupted epoch."""
        if self._batches is None:
            self._batches = iter(self.loader)
        count, self._left = self._left, self._epoch
        return islice(self._batches, count)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loader."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run with newly sampled batches."""
        self.loader.load_state_dict(state)
        self._batches = None
        self._left = self._epoch - int(state["done"]) % self._epoch


def epoch_of(num_samples: int, expected_batch_size: float) -> int:
    """Return the number of steps of an epoch."""
    return max(1, round(num_samples / expected_batch_size))


def loader_of(
    plan: PrivacyPlan,
    dataset: Any,
    users: Sequence[Any] | None,
    samples_per_user: int | None,
    **options: Any,
) -> PrivateLoader:
    """Return the loader of the batches that a plan accounts for.

    Args:
        plan: The plan.
        dataset: A map-style dataset.
        users: The user of each sample; None if the plan protects samples.
        samples_per_user: The largest number of samples of a user in a batch.
        **options: Options that all loaders take.

    Raises:
        ValueError: If the plan's noise is correlated, since the trainer's checkpoints would not be secret.
    """
    if plan.mechanism is not None:
        raise ValueError(SECRET_CHECKPOINTS.format(mechanism=plan.mechanism))
    if users is not None:
        return user_loader(dataset, users, plan=plan, samples_per_user=samples_per_user, **options)
    return (shuffled_loader if plan.shuffled else poisson_loader)(dataset, plan=plan, **options)


def cut(batch: Any, pieces: int, rows: int) -> Iterator[Any]:
    """Yield a batch in microbatches of ``rows`` rows; the last microbatch has the rest."""
    if isinstance(batch, tuple):
        batch = of_users(*batch)
    batch = dict(batch)
    if pieces == 1:
        yield batch
        return
    for number in range(pieces):
        end = (number + 1) * rows if number < pieces - 1 else None
        part = slice(number * rows, end)
        yield tree_map(lambda leaf, part=part: leaf[part] if _has_rows(leaf) else leaf, batch)


def of_users(inputs: Mapping[str, Any], present: Tensor) -> dict[str, Any]:
    """Return the inputs of users, with ignored labels for the samples that only fill up a user.

    Raises:
        ValueError: If the labels are not integers, so that no label means "ignore".
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = "none" if labels is None else getattr(labels, "dtype", type(labels).__name__)
        raise ValueError(
            f"user_column needs integer labels, since the label -100 marks what the loss leaves out, but the labels "
            f"are {kind}. Use clipgrad.user_loader and a loop of your own, with a loss that reads `present`."
        )
    shown = present.reshape(*present.shape, *[1] * (labels.dim() - 2))
    return {**inputs, "labels": torch.where(shown, labels, _IGNORED)}


def rows_of(batch: Any) -> int:
    """Return the number of rows of a batch's first tensor, or 0 if the batch has no tensor."""
    return next((int(leaf.shape[0]) for leaf in tree_leaves(batch) if _has_rows(leaf)), 0)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
