"""How the batch of a step was drawn, in numbers: what the accounting of the step assumes."""

from __future__ import annotations

from dataclasses import dataclass

from . import _checks


@dataclass(frozen=True)
class Poisson:
    """Every sample is in the batch with probability ``sample_rate``, whatever the others do.

    What :class:`clipgrad.sampling.PoissonSampler` draws. Batches vary in size, some are empty, and
    all of them count as steps. Which samples were in a batch must stay secret.

    Args:
        sample_rate: The probability q, ``0 < q <= 1``.

    Raises:
        ValueError: If it is out of range.
    """

    sample_rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", _checks.rate("sample_rate", self.sample_rate))


@dataclass(frozen=True)
class TruncatedPoisson:
    """A Poisson batch that is cut to ``max_batch_size`` if it comes out larger.

    For hardware that takes a fixed number of rows (Chua et al., "Scalable DP-SGD: Shuffling vs.
    Poisson Subsampling", 2024). Those that stay must be a uniformly random subset. Cutting couples
    the samples: one that is added can push another one out, which moves the sum by up to two clip
    norms. The more often batches are cut, the more that costs; far above the mean it costs next to
    nothing. The bound is dp-accounting's (Ganesh, "Tighter Privacy Analysis for Truncated Poisson
    Sampling", 2025), for ``accountant="pld"`` and any relation.

    Args:
        sample_rate: Probability of each sample to be drawn, before the cut.
        num_samples: Size of the dataset.
        max_batch_size: The most samples that a batch keeps.

    Raises:
        ValueError: If a number is out of range.
    """

    sample_rate: float
    num_samples: int
    max_batch_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", _checks.rate("sample_rate", self.sample_rate))
        for name in ("num_samples", "max_batch_size"):
            object.__setattr__(self, name, _checks.integer(name, getattr(self, name), least=1))


@dataclass(frozen=True)
class FixedSize:
    """Passes over the data in batches of a fixed size: shuffled anew, shuffled once or never.

    What an ordinary ``DataLoader`` with ``batch_size=`` does. The order earns nothing here: epsilon
    is that of an adversary who knows it.

    Fix the order. Within one pass a sample is in at most one batch. The other batches depend on it
    only through what was released before, so that a pass costs one Gaussian mechanism, not one per
    batch (parallel composition). Passes add up: ``ceil(steps / floor(num_samples / batch_size))``
    Gaussian mechanisms. An order drawn at random, independently of the data, is a mixture of fixed
    ones, and a mixture is no worse than its worst part (hockey-stick divergence is jointly convex).

    A shuffle does hide something, but nobody knows tightly how much, and it is not what Poisson
    sampling hides: Chua et al., "How Private are DP-SGD Implementations?" (2024) and "Scalable
    DP-SGD: Shuffling vs. Poisson Subsampling" (2024), prove lower bounds for shuffled batches that
    can lie far above Poisson's epsilon.

    **Relations.** The argument needs neighbours of equal size that fill the same places:
    ``"replace_one"`` and ``"replace_special"`` (the sample becomes a null sample, which keeps its
    place). Under ``"add_or_remove_one"`` it fails: one sample less moves every later one by a
    place, so that all the batches behind it change, by two clip norms each. It is refused.

    **The last batch** of a pass may be smaller or left out (``drop_last``): a pass is counted as
    ``floor(num_samples / batch_size)`` steps, which bounds both. Divide by a public constant, as
    ever.

    **Passes must be passes.** Steps that are recorded one after the other are consecutive steps of
    passes, each finished before the next one begins; the first step begins one. Resume a run within
    its pass and with the same order. Batches that are drawn anew for every step, with or without
    replacement, are no passes: one sample may be in all of them.

    Args:
        num_samples: Size of the dataset.
        batch_size: Samples in a batch, at most ``num_samples``.

    Raises:
        ValueError: If a number is out of range.
    """

    num_samples: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            object.__setattr__(self, name, _checks.integer(name, getattr(self, name), least=1))
        if self.batch_size > self.num_samples:
            raise ValueError(
                f"batch_size must be at most num_samples, got {self.batch_size} > "
                f"{self.num_samples}; FullBatch() takes all the samples in every step."
            )


@dataclass(frozen=True)
class FullBatch:
    """Every sample is in every batch."""


Sampling = Poisson | TruncatedPoisson | FixedSize | FullBatch


def require_sampling(value: object) -> Sampling:
    """`value`, if it is a description."""
    if not isinstance(value, Poisson | TruncatedPoisson | FixedSize | FullBatch):
        raise TypeError(
            "sampling must be a Poisson, TruncatedPoisson, FixedSize or FullBatch, got "
            f"{value!r}; Poisson(256 / 60_000), for example."
        )
    return value


def require_supported(
    sampling: Sampling, *, relation: str, accountant: str, group_size: int = 1
) -> None:
    """Refuse what cannot be accounted for, with the remedy.

    Args:
        sampling: How batches were drawn.
        relation: A relation's name.
        accountant: By name.
        group_size: Samples of one person.

    Raises:
        ValueError: If this combination has no bound here.
    """
    if isinstance(sampling, FixedSize) and relation == "add_or_remove_one":
        raise ValueError(
            "FixedSize batches cannot be accounted for under relation 'add_or_remove_one': a "
            "sample more or less shifts all the batches behind it. Use relation='replace_special' "
            "(the same noise) or 'replace_one', or sample by Poisson."
        )
    if isinstance(sampling, TruncatedPoisson):
        if accountant != "pld":
            raise ValueError(
                f"accountant {accountant!r} cannot treat TruncatedPoisson sampling; use accountant='pld'."
            )
        if group_size > 1:
            raise ValueError(
                f"group_size = {group_size} is not supported for TruncatedPoisson sampling; use "
                "Poisson, which never cuts a batch."
            )
    if isinstance(sampling, Poisson) and sampling.sample_rate < 1.0:
        if relation == "replace_one" and accountant != "pld":
            raise ValueError(
                f"accountant {accountant!r} cannot treat relation 'replace_one' under Poisson sampling; use "
                "accountant='pld'."
            )
        if group_size > 1 and accountant != "pld":
            raise ValueError(
                f"accountant {accountant!r} cannot treat group_size = {group_size} under Poisson sampling; "
                "use accountant='pld'."
            )
        if group_size > 1 and relation == "replace_one":
            raise ValueError(
                f"group_size = {group_size} is not supported for relation 'replace_one' under "
                "Poisson sampling; use relation='add_or_remove_one' or 'replace_special'."
            )
