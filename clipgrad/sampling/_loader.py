"""This file holds ``PrivateLoader``, which combines a sampler, a ``DataLoader``, a position and a plan's receipts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from clipgrad.plan.receipts import Receipts
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._shuffled import ShuffledSampler

BatchSampler = PoissonSampler | ShuffledSampler


class PrivateLoader:
    """This loader iterates over random batches and counts the batches that the training loop has received.

    :func:`poisson_loader`, :func:`user_loader` and :func:`shuffled_loader` make it. It wraps a ``DataLoader`` and is no
    subclass, because tools that rebuild a ``DataLoader`` with their own sampler would break the privacy guarantee.

    Args:
        dataset: The dataset that the sampler's indices refer to.
        sampler: The sampler of the batches.
        collate_fn: Makes a batch from a list of samples, which may be empty.
        num_workers: See ``torch.utils.data.DataLoader``.
        pin_memory: See ``torch.utils.data.DataLoader``.
        persistent_workers: See ``torch.utils.data.DataLoader``.
        prefetch_factor: See ``torch.utils.data.DataLoader``.
        receipts: The receipts of a plan; the plan's optimizers use them to identify batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: BatchSampler,
        *,
        collate_fn: Callable[[list[Any]], Any],
        receipts: Receipts | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        self._recorder = _Recorder(sampler)
        self._receipts = receipts
        self._state: dict[str, Any] | None = None
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._recorder,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            prefetch_factor=prefetch_factor,
        )

    @property
    def batch_sampler(self) -> BatchSampler:
        """Return the sampler of the batches."""
        return self._recorder.sampler

    @property
    def dataset(self) -> Dataset[Any]:
        """Return the dataset."""
        return self._loader.dataset

    def __len__(self) -> int:
        """Return the number of batches in one iteration."""
        return len(self._recorder)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of one iteration; right after :meth:`load_state_dict`, the rest of the saved iteration."""
        batches = iter(self._loader)
        pending = self._recorder.pending
        receipts = self._receipts
        iteration = (
            0
            if receipts is None
            else receipts.begin_iteration(self.batch_sampler.part, self.batch_sampler.turns)
        )
        for batch in batches:
            rows, self._state = pending.popleft()
            if receipts is not None:
                receipts.hand_out(iteration, self._state["done"] - 1, rows, batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state after the batch that the training loop received last.

        Batches in the workers' queues do not count, so the state can be saved in the middle of an iteration. The
        current batch counts as used. The state loads with ``weights_only=True``.
        """
        return self.batch_sampler.state_dict() if self._state is None else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration; without a generator, its remaining batches are sampled anew.

        Args:
            state: The :meth:`state_dict` of a loader with the same ``steps``.

        Raises:
            ValueError: If ``state`` does not fit: see :meth:`PoissonSampler.load_state_dict`.
        """
        self.batch_sampler.load_state_dict(state)
        self._state = None


class _Recorder(Sampler[Any]):
    """This sampler yields the batches of ``sampler``, and keeps size and state of each until it is handed out."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler
        self.pending: deque[tuple[int, dict[str, Any]]] = deque()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        pending = self.pending = deque()  # an unfinished earlier iteration keeps its own queue
        return self._record(pending)

    def _record(self, pending: deque[tuple[int, dict[str, Any]]]) -> Iterator[Any]:
        for batch in self.sampler:
            pending.append((len(batch), self.sampler.state_dict()))
            yield batch
