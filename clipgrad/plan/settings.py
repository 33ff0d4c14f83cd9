"""This file holds ``PlanSettings``, the checked numbers of a plan and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipgrad import _validate, accounting
from clipgrad.accounting import FixedSize, FullBatch, Poisson, Sampling, TruncatedPoisson
from clipgrad.clipping import ClippingStrategy, Relation, Schedule, relation_of
from clipgrad.factorisation.strategy import Strategy
from clipgrad.plan.checks import refuse_contradictions, require_count
from clipgrad.plan.correlated import Mechanism, refuse_uncorrelatable, sampling_of


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """This class holds the settings of a ``PrivacyPlan``, which describes them, without the state of its run.

    Raises:
        ValueError: If a number is out of range, or the settings exclude each other.
    """

    num_samples: int
    expected_batch_size: float
    steps: int
    delta: float
    noise_multiplier: float | Schedule
    max_grad_norm: ClippingStrategy = 1.0
    max_batch_size: int | None = None
    shuffled: bool = False
    unit: str = "sample"
    declared_sampling: str | None = None
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    accountant: accounting.Accountant = "pld"
    grid: float | None = None
    mechanism: Mechanism | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps"):
            require_count(name, getattr(self, name))
        size = _validate.positive("expected_batch_size", self.expected_batch_size)
        if size > self.num_samples:
            raise ValueError(
                f"expected_batch_size must be at most num_samples = {self.num_samples}, got {size}."
            )
        if not 0.0 < _validate.number("delta", self.delta) < 1.0:
            raise ValueError(
                f"delta must lie between 0 and 1, got {self.delta}; 1e-5, for example."
            )
        if not callable(self.noise_multiplier):
            noise = _validate.number("noise_multiplier", self.noise_multiplier)
            if not (math.isfinite(noise) and noise >= 0):
                raise ValueError(f"noise_multiplier must be finite and at least 0, got {noise}.")
        if self.grid is not None:
            _validate.positive("grid", self.grid)
        _validate.flag("shuffled", self.shuffled)
        _validate.one_of("unit", self.unit, ("sample", "user"))
        declared: object = self.declared_sampling
        if declared is not None and not (isinstance(declared, str) and declared.strip()):
            raise ValueError(
                f"declared_sampling must be a text that says how batches are sampled, got {declared!r}; for example "
                "'each row with probability q, by our data service'."
            )
        _validate.one_of("accountant", self.accountant, ("pld", "rdp", "rdp_integer"))
        object.__setattr__(self, "relation", relation_of(self.relation))
        refuse_contradictions(
            num_samples=self.num_samples,
            expected_batch_size=self.expected_batch_size,
            max_batch_size=self.max_batch_size,
            shuffled=self.shuffled,
            relation=self.relation,
            accountant=self.accountant,
            grid=self.grid,
        )
        refuse_uncorrelatable(
            self.mechanism,
            shuffled=self.shuffled,
            num_samples=self.num_samples,
            expected_batch_size=self.expected_batch_size,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            others={
                "max_batch_size": self.max_batch_size,
                "declared_sampling": self.declared_sampling,
                "grid": self.grid,
            },
        )
        accounting.require_supported(
            self.sampling, relation=self.relation.value, accountant=self.accountant
        )

    @property
    def sample_rate(self) -> float:
        """Return the probability of each sample to be in a batch."""
        return self.expected_batch_size / self.num_samples

    @property
    def sampling(self) -> Sampling:
        """Return the sampling scheme, for the accountant."""
        if self.mechanism is not None:
            return sampling_of(
                self.mechanism, self.expected_batch_size, self.num_samples, self.shuffled
            )
        if self.shuffled:
            return FixedSize(self.num_samples, int(self.expected_batch_size))
        if self.max_batch_size is not None:
            return TruncatedPoisson(self.sample_rate, self.num_samples, self.max_batch_size)
        return FullBatch() if self.sample_rate == 1.0 else Poisson(self.sample_rate)

    @property
    def noise_accounting(self) -> str:
        """Return the kind of noise, for the accountant: independent in each step, or correlated over some steps."""
        return "independent" if self.mechanism is None else str(self.mechanism)

    @property
    def strategy(self) -> Strategy | None:
        """Return the matrix of correlated noise; None for independent noise."""
        separation = math.floor(self.num_samples / self.expected_batch_size)
        return None if self.mechanism is None else self.mechanism.strategy(self.steps, separation)

    def noise_at(self, step: int) -> float:
        """Return the noise multiplier of a step; the first step is step 0."""
        if callable(self.noise_multiplier):
            return _validate.number(f"noise_multiplier({step})", self.noise_multiplier(step))
        return float(self.noise_multiplier)
