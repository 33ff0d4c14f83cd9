"""``PrivateLoader``: a sampler and PyTorch's workers, how far the training loop is, and receipts for a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from clipgrad.plan.receipts import Receipts
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._shuffled import ShuffledSampler
from clipgrad.sampling._users import UserSampler

BatchSampler = PoissonSampler | UserSampler | ShuffledSampler


class PrivateLoader:
    """Iterates over batches, and knows how many the training loop has received.

    Made by :func:`poisson_loader`, :func:`user_loader` and :func:`shuffled_loader`. It wraps a ``DataLoader`` and is
    none: tools that rebuild a ``DataLoader`` with a sampler of their own would end the privacy.

    Args:
        dataset: What the sampler's indices refer to.
        sampler: Draws the batches.
        collate_fn: Makes a batch of samples, of which there may be none.
        num_workers: As in ``DataLoader``, also for the next two.
        pin_memory: Whether batches are copied to page-locked memory.
        persistent_workers: Whether workers outlive an iteration.
        receipts: Of a plan, whose optimizers then know which batch is which.
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
        )

    @property
    def batch_sampler(self) -> BatchSampler:
        """Draws the batches."""
        return self._recorder.sampler

    @property
    def dataset(self) -> Dataset[Any]:
        """Where the samples come from."""
        return self._loader.dataset

    def __len__(self) -> int:
        """Number of batches in one iteration."""
        return len(self._recorder)

    def __iter__(self) -> Iterator[Any]:
        """One iteration, or, just after :meth:`load_state_dict`, what was left of the saved one."""
        batches = iter(self._loader)
        drawn = self._recorder.drawn
        receipts = self._receipts
        iteration = 0 if receipts is None else receipts.begin_iteration()
        for batch in batches:
            rows, self._state = drawn.popleft()
            if receipts is not None:
                receipts.hand_out(iteration, self._state["done"] - 1, rows, batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state when it drew the batch that was handed out last.

        Batches that wait in the queues of workers do not count, so that it may be saved in the
        middle of an iteration: the batch at hand counts as used. It loads with
        ``weights_only=True``.
        """
        return self.batch_sampler.state_dict() if self._state is None else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration: its remaining batches, drawn anew unless a generator was given.

        Args:
            state: What :meth:`state_dict` of a loader with the same ``steps`` returned.

        Raises:
            ValueError: If ``state`` does not fit: see :meth:`PoissonSampler.load_state_dict`.
        """
        self.batch_sampler.load_state_dict(state)
        self._state = None


class _Recorder(Sampler[Any]):
    """Draws what ``sampler`` draws, and keeps size and state of each batch until it is handed out."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler
        self.drawn: deque[tuple[int, dict[str, Any]]] = deque()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        drawn = self.drawn = deque()  # an iteration that was left behind keeps its own
        return self._recorded(drawn)

    def _recorded(self, drawn: deque[tuple[int, dict[str, Any]]]) -> Iterator[Any]:
        for batch in self.sampler:
            drawn.append((len(batch), self.sampler.state_dict()))
            yield batch
