"""Describe how the batch of a step was sampled, in the numbers that its accounting needs."""

from __future__ import annotations

from dataclasses import dataclass

from . import _checks


@dataclass(frozen=True)
class Poisson:
    """Each sample is in the batch with probability ``sample_rate``, independently of all other samples.

    :class:`clipgrad.sampling.PoissonSampler` samples such batches. They vary in size, some are empty, and all of them
    count as steps. Which samples were in a batch must stay secret.

    Args:
        sample_rate: The probability q, ``0 < q <= 1``.

    Raises:
        ValueError: If ``sample_rate`` is out of range.
    """

    sample_rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", _checks.rate("sample_rate", self.sample_rate))


@dataclass(frozen=True)
class TruncatedPoisson:
    """A Poisson batch is cut to ``max_batch_size`` samples if it is larger.

    This serves hardware that takes a fixed number of rows (Chua et al., "Scalable DP-SGD: Shuffling vs. Poisson
    Subsampling", 2024). The remaining samples must be a uniformly random subset. Cutting makes samples dependent: an
    added sample can displace another one, which moves the sum by up to two clip norms. The cost grows with the
    frequency of cuts and is negligible if ``max_batch_size`` is far above the mean. The bound is dp-accounting's
    (Ganesh, "Tighter Privacy Analysis for Truncated Poisson Sampling", 2025), for ``accountant="pld"`` and any
    relation.

    Args:
        sample_rate: Probability of each sample to be selected, before the cut.
        num_samples: Size of the dataset.
        max_batch_size: The largest number of samples in a batch.

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
    """Passes over the data use batches of a fixed size; the data is shuffled for every pass, once, or never.

    An ordinary ``DataLoader`` with ``batch_size=`` does this. The random order does not reduce epsilon: the bound is
    for an adversary who knows the order.

    For a fixed order, a sample is in at most one batch of a pass. The other batches depend on the sample only through
    earlier releases, so a pass costs one Gaussian mechanism instead of one per batch (parallel composition). Passes add
    up: ``ceil(steps / floor(num_samples / batch_size))`` Gaussian mechanisms. A random order that is independent of the
    data is a mixture of fixed orders, and a mixture is no worse than its worst component (hockey-stick divergence is
    jointly convex).

    A shuffle does hide something, but no tight bound is known, and the effect differs from Poisson sampling: Chua et
    al., "How Private are DP-SGD Implementations?" (2024) and "Scalable DP-SGD: Shuffling vs. Poisson Subsampling"
    (2024), prove lower bounds for shuffled batches that can lie far above Poisson's epsilon.

    **Relations.** The argument needs neighbours of equal size, with the same samples at the same places:
    ``"replace_one"`` and ``"replace_special"`` (a null sample takes the sample's place). It fails under
    ``"add_or_remove_one"``, which is refused: removing a sample moves every later sample by one place, so that all
    later batches change, each by two clip norms.

    **The last batch** of a pass may be smaller or omitted (``drop_last``): a pass is counted as
    ``floor(num_samples / batch_size)`` steps, which bounds both. Always divide the sum by a public constant.

    **Passes must be passes.** Steps recorded one after the other are consecutive steps of passes. The first step begins
    a pass, and each pass ends before the next one begins. Resume a run within its pass with the same order. Batches
    sampled anew for every step, with or without replacement, are no passes: one sample may be in all of them.

    Args:
        num_samples: Size of the dataset.
        batch_size: Number of samples in a batch, at most ``num_samples``.

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
    """Each sample is in every batch."""


@dataclass(frozen=True)
class CyclicPoisson:
    """Each sample belongs to one of ``bands`` groups, and the batch of step t is a Poisson sample of group t mod bands.

    It serves noise that is correlated over ``bands`` steps (:class:`clipgrad.BandedFactorisation`). The noise
    multiplier is then that of the independent noise Z, per unit of sensitivity times the norm of a column of C.

    **Why this holds** (Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", 2023, theorem 4). Fix all
    groups. The columns of C of one group's steps have no row in common. So the run is, for a sample of the group, a
    sequence of blocks of ``bands`` steps. In each block the sample takes part with probability q, and then moves the
    block by one column times its clipped gradient. That is one Gaussian mechanism on a Poisson sample. All other terms
    of a block follow from earlier releases and from other samples. There are at most ``ceil(steps / bands)`` blocks,
    and fewer if the run stops early.

    **Groups** must be drawn for each sample on its own, independently of the data and of other samples, once for the
    run. A bound for all fixed groups then holds for random ones (hockey-stick divergence is jointly convex), also if
    neighbours differ in size.

    Args:
        sample_rate: Probability q of a sample of the group to be in the batch: the expected batch size times ``bands``
            over the size of the dataset, at most 1.
        bands: Number of groups, at least the number of bands of C.

    Raises:
        ValueError: If a number is out of range.
    """

    sample_rate: float
    bands: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", _checks.rate("sample_rate", self.sample_rate))
        object.__setattr__(self, "bands", _checks.integer("bands", self.bands, least=1))

    def rounds(self, steps: int) -> int:
        """Return how often a sample can take part in ``steps`` consecutive steps of a run."""
        return -(-steps // self.bands)


Sampling = Poisson | TruncatedPoisson | FixedSize | FullBatch | CyclicPoisson


def require_sampling(value: object) -> Sampling:
    """Return ``value`` if it describes a sampling."""
    if not isinstance(value, Sampling):
        raise TypeError(
            "sampling must be a Poisson, TruncatedPoisson, FixedSize, FullBatch or CyclicPoisson, got "
            f"{value!r}; Poisson(256 / 60_000), for example."
        )
    return value


def require_supported(
    sampling: Sampling, *, relation: str, accountant: str, group_size: int = 1
) -> None:
    """Refuse combinations that cannot be accounted for, and name the remedy.

    Args:
        sampling: How batches are sampled.
        relation: Name of the relation.
        accountant: Name of the accountant.
        group_size: The largest number of samples of one person.

    Raises:
        ValueError: If this combination has no bound here.
    """
    if isinstance(sampling, FixedSize) and relation == "add_or_remove_one":
        raise ValueError(
            "FixedSize batches cannot be accounted for under relation 'add_or_remove_one': one "
            "sample more or less shifts all later batches. Use relation='replace_special' "
            "(the same noise) or 'replace_one', or Poisson sampling."
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
    if isinstance(sampling, CyclicPoisson) and group_size > 1:
        raise ValueError(
            f"group_size = {group_size} is not supported for CyclicPoisson sampling: samples of one person have their "
            "turns in different steps, whose noise is correlated. Sample users (user_loader) instead."
        )
    if isinstance(sampling, Poisson | CyclicPoisson) and sampling.sample_rate < 1.0:
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
