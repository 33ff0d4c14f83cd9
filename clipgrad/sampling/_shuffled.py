"""This file holds ``ShuffledSampler``, which makes batches of a fixed size, with each sample at most once a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from clipgrad.accounting import FixedSize
from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._groups import named
from clipgrad.sampling._resumable import Resumable


class ShuffledSampler(Resumable[list[int]]):
    """This sampler shuffles all indices for each pass and cuts them into batches; :func:`shuffled_loader` makes it.

    It leaves out a smaller last batch. The plan claims no amplification, so the order need not be secret, and PyTorch's
    generator is sufficient.

    Args:
        num_samples: Size of the dataset.
        batch_size: Number of samples in every batch.
        steps: Batches per iteration, over as many passes as needed.
        fixed_order: Whether all passes have the same random order, as correlated noise needs it: a sample then takes
            part exactly once in ``num_samples // batch_size`` steps. Samples that fill no batch never take part. The
            order is part of the state.
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
        fixed_order: bool = False,
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
        self._order = torch.randperm(num_samples, generator=generator) if fixed_order else None

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

        The rest begins with a new pass, which the ledger counts as another pass; with a fixed order it goes on.
        """
        to_come = self._to_come()
        per_pass = self._num_samples // self._batch_size
        start = to_come.start if self._order is None else 0
        order: list[int] = [] if self._order is None else self._order.tolist()
        for step in to_come:
            at = (step - start) % per_pass
            if at == 0 and self._order is None:
                order = torch.randperm(self._num_samples, generator=self._generator).tolist()
            self._done = step + 1
            yield order[at * self._batch_size : (at + 1) * self._batch_size]

    @property
    def turns(self) -> str:
        """Return a name of a fixed order; empty without one."""
        return "" if self._order is None else named(self._order.numpy())

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches of the iteration so far, and a fixed order."""
        state = super().state_dict()
        return state if self._order is None else {**state, "order": self._order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration.

        Args:
            state: The ``state_dict`` of a sampler for the same data and plan, or of its loader.

        Raises:
            ValueError: If ``state`` does not fit.
        """
        order = state.get("order")
        if state.get("kind") == self._kind and (order is None) != (self._order is None):
            raise ValueError(
                f"state {'lacks' if order is None else 'has'} a fixed order, unlike this sampler; construct it with "
                "the plan it was saved with."
            )
        if order is not None and sorted(order.tolist()) != list(range(self._num_samples)):
            raise ValueError(
                f"state has an order of {len(order)} samples, which does not fit {self._num_samples} samples; "
                "construct the sampler with the data it was saved with."
            )
        super().load_state_dict(state)
        self._order = None if order is None else order.cpu()
