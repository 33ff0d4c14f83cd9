"""Poisson batches: each sample is in each batch with the same probability, whatever the others do.

That is the sampling which privacy amplification, and so :mod:`clipgrad.accounting`, assumes (Abadi
et al., "Deep Learning with Differential Privacy", 2016). Batches then differ in size, and some are
empty: an empty batch is still a step and still gets its noise.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from clipgrad._collate import EmptyBatchCollate
from clipgrad.noise import os_seeded_generator

__all__ = ["EmptyBatchCollate", "PoissonSampler", "poisson_loader"]


class PoissonSampler(Sampler[list[int]]):
    """Draws Poisson batches of indices; give it to a ``DataLoader`` as ``batch_sampler``.

    Instead of asking every index, it draws the gaps between those that are in. They are geometric,
    ``1 + floor(E / -log(1 - q))`` with E exponential, so that a batch costs time in proportion to
    its own size. Uniforms have 53 bits; PyTorch's float32 ones have 24, too few for a small q.

    Which samples were in a batch must stay secret. By default the generator is seeded by the
    operating system, anew in a copy, in a forked child and after :meth:`load_state_dict`.

    Args:
        num_samples: Size of the dataset.
        expected_batch_size: Mean size of a batch, ``q * num_samples``; give it or ``sample_rate``.
        sample_rate: Probability q of each sample to be in a batch, ``0 < q <= 1``.
        steps: Batches per iteration; by default as many as make ``num_samples`` draws on average.
        generator: A CPU generator for a repeatable and NOT PRIVATE choice; it advances.

    Raises:
        ValueError: If a number is out of range, or not exactly one of the two rates is given.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> generator = torch.Generator().manual_seed(1)
        >>> sampler = PoissonSampler(6, expected_batch_size=2, generator=generator)
        >>> len(sampler), round(sampler.sample_rate, 4)
        (3, 0.3333)
        >>> [len(batch) for batch in PoissonSampler(6, sample_rate=1.0, steps=2)]
        [6, 6]
    """

    def __init__(
        self,
        num_samples: int,
        *,
        expected_batch_size: float | None = None,
        sample_rate: float | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._num_samples = _count("num_samples", num_samples)
        if (expected_batch_size is None) == (sample_rate is None):
            raise ValueError(
                f"expected_batch_size and sample_rate are {expected_batch_size} and {sample_rate}; "
                "give exactly one of them, the other follows."
            )
        if sample_rate is not None:
            self._rate = _within("sample_rate", sample_rate, 1)
            self._expected = self._rate * num_samples
        else:
            self._expected = _within("expected_batch_size", expected_batch_size, num_samples)
            self._rate = self._expected / num_samples
        # len() is a 64-bit integer, whatever the rate.
        default_steps = max(1, round(min(num_samples / self._expected, 2.0**62)))
        self._steps = default_steps if steps is None else _count("steps", steps)
        if generator is not None and getattr(generator, "device", None) != torch.device("cpu"):
            raise TypeError(
                f"generator must be a torch.Generator on the CPU, got {generator!r}; leave it out "
                "for private batches."
            )
        self._given = generator
        self._own: tuple[int, torch.Generator] | None = None
        self._done = 0
        self._resume = False

    @property
    def sample_rate(self) -> float:
        """Probability of each sample to be in a batch: what the accountant needs."""
        return self._rate

    @property
    def expected_batch_size(self) -> float:
        """Mean size of a batch: a public constant, and so what the sum may be divided by."""
        return self._expected

    def __len__(self) -> int:
        """Number of batches in one iteration."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """One iteration, or, just after :meth:`load_state_dict`, what was left of the saved one."""
        first = self._done if self._resume else 0
        self._resume = False
        for step in range(first, self._steps):
            batch = self._draw()
            self._done = step + 1
            yield batch

    def _draw(self) -> list[int]:
        generator, size, rate = self._generator(), self._num_samples, self._rate
        scale = math.inf if rate == 1.0 else -math.log1p(-rate)
        found: list[Tensor] = []
        last = -1
        while last < size:
            # Nearly always enough at once: five standard deviations more than are expected.
            left = rate * (size - last)
            count = int(left + 5 * math.sqrt(left)) + 5
            exponential = -torch.log1p(-torch.rand(count, dtype=torch.float64, generator=generator))
            # A gap beyond the end is as good as any other, and does not overflow the sum.
            gaps = (exponential / scale).floor_().clamp_(max=size).to(torch.int64) + 1
            found.append(gaps.cumsum(0) + last)
            last = int(found[-1][-1])
        indices = torch.cat(found)
        batch: list[int] = indices[indices < size].tolist()
        return batch

    def _generator(self) -> torch.Generator:
        if self._given is not None:
            return self._given
        pid = os.getpid()
        if self._own is None or self._own[0] != pid:  # a forked child must not repeat its parent
            self._own = (pid, os_seeded_generator())
        return self._own[1]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: everything but the private generator."""
        return {**self.__dict__, "_own": None}

    def state_dict(self) -> dict[str, Any]:
        """How far the current iteration is and, if a generator was given, its exact state.

        A ``DataLoader`` with workers asks for batches ahead of time; save between iterations then,
        or the batches that wait in its queue count as done.
        """
        state = {"kind": "PoissonSampler", "format": 1, "done": self._done % self._steps}
        if self._given is not None:
            state["generator"] = self._given.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration: with a given generator exactly, else with fresh randomness.

        Args:
            state: What :meth:`state_dict` of a sampler with the same ``steps`` returned.

        Raises:
            ValueError: If ``state`` is not a sampler's, or only one of the two has a generator.
        """
        if (state.get("kind"), state.get("format")) != ("PoissonSampler", 1):
            raise ValueError(
                "state must come from PoissonSampler.state_dict(), got kind and format "
                f"{(state.get('kind'), state.get('format'))}."
            )
        if ("generator" in state) != (self._given is not None):
            raise ValueError(
                f"state {'has' if 'generator' in state else 'lacks'} a generator's state, unlike "
                "this sampler; construct both with a generator, or both without."
            )
        if not 0 <= state["done"] < self._steps:
            raise ValueError(
                f"state is {state['done']} batches into an iteration, but steps is {self._steps}; "
                "construct the sampler with the steps it was saved with."
            )
        if self._given is not None:
            self._given.set_state(state["generator"].cpu())
        self._own, self._done, self._resume = None, int(state["done"]), True


def poisson_loader(
    dataset: Dataset[Any],
    *,
    expected_batch_size: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    num_workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool = False,
) -> DataLoader[Any]:
    """A ``DataLoader`` of Poisson batches, the empty ones included.

    Args:
        dataset: A map-style dataset; its first sample shows what an empty batch looks like.
        expected_batch_size: See :class:`PoissonSampler`, also for the next three.
        sample_rate: Probability of each sample to be in a batch.
        steps: Batches per iteration.
        generator: For repeatable, NOT PRIVATE batches.
        collate_fn: See :class:`EmptyBatchCollate`.
        num_workers: As in ``DataLoader``, also for the next two.
        pin_memory: Whether batches are copied to page-locked memory.
        persistent_workers: Whether workers outlive an iteration.

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
    """
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"dataset must have a length, got {type(dataset).__name__}; use a map-style dataset, "
            "from which samples can be drawn by index."
        )
    sampler = PoissonSampler(
        len(dataset),
        expected_batch_size=expected_batch_size,
        sample_rate=sample_rate,
        steps=steps,
        generator=generator,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=EmptyBatchCollate(dataset[0], collate_fn),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
    )


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return int(value)


def _within(name: str, value: object, most: int) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    number = float(value)
    if not 0.0 < number <= most:
        raise ValueError(f"{name} must be positive and at most {most}, got {value}.")
    return number
