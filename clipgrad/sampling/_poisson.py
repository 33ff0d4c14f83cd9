"""This file holds ``PoissonSampler``, which makes Poisson batches of indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from clipgrad.accounting import CyclicPoisson, Poisson, TruncatedPoisson
from clipgrad.sampling import _arguments as arguments
from clipgrad.sampling._groups import Groups
from clipgrad.sampling._resumable import Resumable
from clipgrad.sampling._trials import LARGEST, Trials, random_subset
from clipgrad.sampling._words import words_from


class PoissonSampler(Resumable[list[int]]):
    """This sampler makes Poisson batches of indices; :func:`poisson_loader` makes the sampler and a loader for it.

    It jumps from one sampled index to the next, so that the time for a batch is proportional to the batch's size.
    Independently of other indices, an index is in a batch with probability ``q * (1 + e)``, where q is the float
    ``sample_rate`` and ``|e| <= 2**-57`` for ``q >= 1e-9`` (0 for ``q >= 1/2``, below ``2**-51`` for every float).

    It must stay secret which samples are in a batch. By default all randomness comes from the operating system's
    cryptographic generator and no state is kept, so copies, forked children and restored checkpoints are independent.

    **Truncated** (``max_batch_size``): a uniformly random subset of that size replaces a larger batch. One sample may
    then displace another, which the accountant must know: see :attr:`sampling` and Chua et al., "Scalable DP-SGD:
    Shuffling vs. Poisson Subsampling", 2024.

    **Across ranks** (``rank``, ``num_replicas``): rank r samples from its own share of the indices, ``r, r + n,
    r + 2n, ...``. The shares are disjoint and make up the dataset. So the batches of all ranks together are one Poisson
    sample of the whole dataset with the same q, without any communication.

    **Cyclic** (``bands``): each index belongs to one of ``bands`` groups, drawn for each index on its own. The batch of
    step t has indices of group ``t % bands`` only, each with probability ``q * bands``. So an index is in two batches
    that are at least ``bands`` steps apart, as correlated noise needs it (:class:`clipgrad.BandedFactorisation`). The
    groups are part of the state, and a restored sampler keeps them.

    Args:
        num_samples: Size of the dataset.
        expected_batch_size: Mean size of a batch, ``q * num_samples``, of all ranks together and before truncation;
            give it or ``sample_rate``.
        sample_rate: Probability q of each sample to be in a batch, ``0 < q <= 1``.
        max_batch_size: The largest number of samples in a batch. It excludes ranks, since the analysis of truncation
            holds for one subset of the whole batch.
        bands: Number of groups that have their turn one after the other; 1 for plain Poisson batches.
        steps: Batches per iteration; by default the number that samples ``num_samples`` indices on average.
        rank: Index of the share to sample from, ``0 <= rank < num_replicas``.
        num_replicas: Number of shares, the same on every rank. If neither is given, they are rank and number of
            processes of ``torch.distributed``, if it was initialised.
        whole_run: Whether the sampler is for one iteration only, as with a plan. The state of a finished iteration is
            then restored as finished, and yields no batch.
        generator: A CPU generator for repeatable and NOT PRIVATE batches; the sampler advances it. With ranks, seed
            each rank's generator differently.

    Raises:
        ValueError: If a number is out of range, not exactly one of the two rates is given, or arguments exclude each
            other.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> generator = torch.Generator().manual_seed(1)
        >>> sampler = PoissonSampler(6, expected_batch_size=2, generator=generator)
        >>> len(sampler), round(sampler.sample_rate, 4)
        (3, 0.3333)
        >>> [len(batch) for batch in PoissonSampler(6, sample_rate=1.0, steps=2)]
        [6, 6]
        >>> list(PoissonSampler(6, sample_rate=1.0, steps=1, rank=1, num_replicas=4))
        [[1, 5]]
        >>> [len(batch) for batch in PoissonSampler(6, sample_rate=1.0, max_batch_size=4)]
        [4]
    """

    _kind = "PoissonSampler"

    def __init__(
        self,
        num_samples: int,
        *,
        expected_batch_size: float | None = None,
        sample_rate: float | None = None,
        max_batch_size: int | None = None,
        bands: int | None = None,
        steps: int | None = None,
        rank: int | None = None,
        num_replicas: int | None = None,
        whole_run: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._num_samples = arguments.count("num_samples", num_samples, most=LARGEST)
        self._expected, rate = _rates(self._num_samples, expected_batch_size, sample_rate)
        # len() is a 64-bit integer, whatever the rate.
        default_steps = max(1, round(min(num_samples / self._expected, 2.0**62)))
        count = default_steps if steps is None else arguments.count("steps", steps)
        super().__init__(count, whole_run=whole_run)
        self._share = arguments.share(self._num_samples, rank, num_replicas)
        if max_batch_size is not None and self._share.step > 1:
            raise ValueError(
                f"max_batch_size = {max_batch_size} and num_replicas = {num_replicas} exclude each "
                "other: no analysis covers ranks that truncate separately. Leave "
                "max_batch_size out, and bound memory by the optimizer's microbatch_size."
            )
        self._most = (
            None if max_batch_size is None else arguments.count("max_batch_size", max_batch_size)
        )
        self._generator = generator
        self._words = words_from(generator)
        self._rate = rate
        self._groups: Groups | None = None
        if bands is not None:
            if self._most is not None:
                raise ValueError(
                    f"max_batch_size = {max_batch_size} and bands = {bands} exclude each other: no analysis covers "
                    "cyclic batches that are cut. Leave max_batch_size out."
                )
            number = arguments.count("bands", bands)
            self._groups = Groups.drawn(len(self._share), number, self._words)
            rate = arguments.within(
                "expected_batch_size * bands / num_samples",
                self._expected * number / self._num_samples,
                1,
            )
        self._trials = Trials.of_rate(rate)

    @property
    def sample_rate(self) -> float:
        """Return the probability of each sample to be in a batch, before truncation and over all groups."""
        return self._rate

    @property
    def expected_batch_size(self) -> float:
        """Return the mean size of a batch, of all ranks together and before truncation.

        It is a public constant, so the sum of gradients may be divided by it.
        """
        return self._expected

    @property
    def max_batch_size(self) -> int | None:
        """Return the largest number of samples in a batch; None without truncation."""
        return self._most

    @property
    def turns(self) -> str:
        """Return a name of the groups of cyclic batches; empty for others."""
        return "" if self._groups is None else self._groups.name

    @property
    def part(self) -> tuple[int, int]:
        """Return which share of the indices is sampled from, and of how many shares."""
        return self._share.start % self._share.step, self._share.step

    @property
    def sampling(self) -> Poisson | TruncatedPoisson | CyclicPoisson:
        """Return the sampling scheme, for the accountant."""
        if self._groups is not None:
            return CyclicPoisson(sample_rate=self._trials.rate, bands=self._groups.bands)
        if self._most is None:
            return Poisson(sample_rate=self.sample_rate)
        return TruncatedPoisson(
            sample_rate=self.sample_rate,
            num_samples=self._num_samples,
            max_batch_size=self._most,
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one iteration; right after :meth:`load_state_dict`, the rest of the saved iteration."""
        for step in self._to_come():
            batch = self._draw(step)
            self._done = step + 1
            yield batch

    def _draw(self, step: int) -> list[int]:
        if self._groups is None:
            sampled = self._trials.successes(len(self._share), self._words)
        else:
            group = self._groups.of_step(step)
            sampled = group[self._trials.successes(len(group), self._words)]
        if self._most is not None and len(sampled) > self._most:
            sampled = sampled[random_subset(len(sampled), self._most, self._words)]
        batch: list[int] = (self._share.start + self._share.step * sampled).tolist()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches of the iteration so far and, if a generator was given, its RNG state.

        A loader with workers samples ahead of the training loop. :meth:`PrivateLoader.state_dict` returns the state
        after the batch that the loop received last, in the same format.
        """
        state = super().state_dict()
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        if self._groups is not None:
            state["groups"] = self._groups.state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration: exactly if a generator is given, otherwise with fresh randomness.

        Args:
            state: The ``state_dict`` of a sampler with the same ``steps``, or of its loader.

        Raises:
            ValueError: If ``state`` is not a sampler's, or only one of state and sampler has a generator.
        """
        if state.get("kind") == self._kind and ("generator" in state) != (
            self._generator is not None
        ):
            raise ValueError(
                f"state {'has' if 'generator' in state else 'lacks'} a generator's state, unlike "
                "this sampler; construct both with a generator, or both without."
            )
        if state.get("kind") == self._kind and ("groups" in state) != (self._groups is not None):
            raise ValueError(
                f"state {'has' if 'groups' in state else 'lacks'} the groups of cyclic batches, unlike this sampler; "
                "construct it with the plan it was saved with."
            )
        groups = self._groups
        if groups is not None and "groups" in state:
            groups = groups.restored(state["groups"])
        super().load_state_dict(state)
        self._groups = groups
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())


def _rates(
    num_samples: int, expected_batch_size: object, sample_rate: object
) -> tuple[float, float]:
    """Return expected batch size and sample rate, one of which is given."""
    if (expected_batch_size is None) == (sample_rate is None):
        raise ValueError(
            f"expected_batch_size and sample_rate are {expected_batch_size} and {sample_rate}; "
            "give exactly one of them, the other follows."
        )
    if sample_rate is not None:
        rate = arguments.within("sample_rate", sample_rate, 1)
        return rate * num_samples, rate
    expected = arguments.within("expected_batch_size", expected_batch_size, num_samples)
    return expected, expected / num_samples
