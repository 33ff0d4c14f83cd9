"""This file holds ``ShuffledSampler``, which makes batches of a fixed size, with each sample at most once a pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clipgrad.accounting import FixedSize
from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._resumable import Resumable


class ShuffledSampler(Resumable[list[int]]):
    """This sampler shuffles all indices for each pass and cuts them into batches; :func:`shuffled_loader` makes it.

    It leaves out a smaller last batch. The plan claims no amplification, so the order need not be secret, and PyTorch's
    generator is sufficient.

    Args:
        num_samples: Size of the dataset.
        batch_size: Number of samples in every batch.
        steps: Batches per iteration, over as many passes as needed.
        generator: A CPU generator for a repeatable order.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> sampler = ShuffledSampler(5, batch_size=2, steps=3)
        >>> [len(batch) for batch in sampler], sampler.sampling
        ([2, 2, 2], FixedSize(num_samples=5, batch_size=2))
    """

    _kind = "ShuffledSampler"

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self._num_samples = arguments.count("num_samples", num_samples)
        self._batch_size = arguments.count("batch_size", batch_size)
        if batch_size > num_samples:
            raise ValueError(
                f"batch_size must be at most num_samples = {num_samples}, got {batch_size}."
            )
        super().__init__(arguments.count("steps", steps), whole_run=True)
        self._generator = generator

    @property
    def part(self) -> tuple[int, int]:
        """Return that the whole dataset is sampled from, as one part of one."""
        return 0, 1

    @property
    def sampling(self) -> FixedSize:
        """Return the sampling scheme, for the accountant."""
        return FixedSize(self._num_samples, self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one iteration; right after :meth:`load_state_dict`, the rest of it.

        The rest begins with a new pass, which the ledger counts as another pass.
        """
        to_come = self._to_come()
        per_pass = self._num_samples // self._batch_size
        order: list[int] = []
        for step in to_come:
            at = (step - to_come.start) % per_pass
            if at == 0:
                order = torch.randperm(self._num_samples, generator=self._generator).tolist()
            self._done = step + 1
            yield order[at * self._batch_size : (at + 1) * self._batch_size]
