"""``PrivacyPlan``: one description of a private run, from which sampler, optimizer and accountant are built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from clipgrad import _validate, accounting
from clipgrad.accounting import FixedSize, FullBatch, Ledger, Poisson, Sampling, TruncatedPoisson
from clipgrad.clipping import ClippingStrategy, Relation, Schedule, relation_of


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is sampled, clipped and noised, and how often: said once, so that no two parts can disagree.

    ``poisson_loader(dataset, plan=plan)`` draws its batches; ``DPOptimizer(..., plan=plan)`` clips, adds the noise,
    keeps the ledger and refuses to take more steps than planned.

    Args:
        num_samples: Size of the dataset; the number of users if batches are made of users.
        expected_batch_size: Mean size of a batch, and the public constant that sums are divided by. At
            ``num_samples`` every sample is in every batch.
        steps: Noisy steps of the run, empty batches included.
        delta: Probability with which epsilon may fail to hold; choose it well below ``1 / num_samples``.
        noise_multiplier: Noise standard deviation per unit of sensitivity, or a function of the step, from 0 on.
        max_grad_norm: Clipping norm; see ``DPOptimizer``.
        max_batch_size: Cut Poisson batches to this size, and account for it.
        shuffled: Batches of a fixed size, each sample once an epoch, instead of Poisson batches. No amplification by
            sampling is claimed (Chua et al. 2024, arXiv:2403.17673), so epsilon is much larger; only for the
            relations ``REPLACE_ONE`` and ``REPLACE_SPECIAL``.
        relation: Which datasets are neighbours.
        accountant: ``"pld"`` (tight), ``"rdp"`` (quick, for a progress bar) or, with a grid, ``"rdp_integer"``.
        grid: Exact mode: the spacing of an integer grid; see ``DPOptimizer``.

    Raises:
        ValueError: If a number is out of range, or the settings exclude each other.

    Examples:
        >>> plan = PrivacyPlan.for_epsilon(
        ...     3.0,
        ...     num_samples=60_000,
        ...     expected_batch_size=256,
        ...     steps=3_500,
        ...     delta=1e-5,
        ...     accountant="rdp",
        ... )
        >>> round(plan.noise_multiplier, 2), plan.epsilon() <= 3.0
        (0.77, True)
        >>> print(plan)
        (epsilon = 3.00, delta = 1e-05)-differentially private towards adding or removing one sample: 3500 steps on
        Poisson batches of 256 of 60000 samples (q = 0.00426667), Gaussian noise of 0.77 sensitivities, clipping
        norm 1.0, accountant rdp.
    """

    num_samples: int
    expected_batch_size: float
    steps: int
    delta: float
    noise_multiplier: float | Schedule
    max_grad_norm: ClippingStrategy = 1.0
    max_batch_size: int | None = None
    shuffled: bool = False
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    accountant: accounting.Accountant = "pld"
    grid: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps"):
            _count(name, getattr(self, name))
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
        _validate.one_of("accountant", self.accountant, ("pld", "rdp", "rdp_integer"))
        object.__setattr__(self, "relation", relation_of(self.relation))
        self._refuse_contradictions()
        accounting.require_supported(
            self.sampling, relation=self.relation.value, accountant=self.accountant
        )

    @classmethod
    def for_epsilon(
        cls,
        target_epsilon: float,
        *,
        num_samples: int,
        expected_batch_size: float,
        steps: int,
        delta: float,
        max_grad_norm: ClippingStrategy = 1.0,
        max_batch_size: int | None = None,
        shuffled: bool = False,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        accountant: accounting.Accountant = "pld",
        grid: float | None = None,
    ) -> PrivacyPlan:
        """The plan with the least noise that stays within ``target_epsilon``; the other arguments are the plan's.

        Raises:
            ValueError: If no noise meets the target, or all noise does.
            ImportError: If ``dp-accounting`` is not installed.
        """
        if target_epsilon == math.inf:
            raise ValueError(
                "target_epsilon must be finite, got inf, which promises nothing. For a run without noise make "
                "PrivacyPlan(noise_multiplier=0.0, ...)."
            )
        plan = cls(
            num_samples=num_samples,
            expected_batch_size=expected_batch_size,
            steps=steps,
            delta=delta,
            noise_multiplier=1.0,
            max_grad_norm=max_grad_norm,
            max_batch_size=max_batch_size,
            shuffled=shuffled,
            relation=relation,
            accountant=accountant,
            grid=grid,
        )
        noise = accounting.noise_multiplier(
            target_epsilon=target_epsilon,
            sampling=plan.sampling,
            steps=plan.steps,
            delta=plan.delta,
            accountant=plan.accountant,
            relation=plan.relation,
        )
        return plan.with_noise(noise)

    def with_noise(self, noise_multiplier: float | Schedule) -> PrivacyPlan:
        """The same plan with other noise."""
        return replace(self, noise_multiplier=noise_multiplier)

    @property
    def sample_rate(self) -> float:
        """Probability of each sample to be in a batch."""
        return self.expected_batch_size / self.num_samples

    @property
    def sampling(self) -> Sampling:
        """How batches come about, as the accountant is told."""
        if self.shuffled:
            return FixedSize(self.num_samples, int(self.expected_batch_size))
        if self.max_batch_size is not None:
            return TruncatedPoisson(self.sample_rate, self.num_samples, self.max_batch_size)
        return FullBatch() if self.sample_rate == 1.0 else Poisson(self.sample_rate)

    def noise_at(self, step: int) -> float:
        """The noise multiplier of a step, the first of which is step 0."""
        if callable(self.noise_multiplier):
            return _validate.number(f"noise_multiplier({step})", self.noise_multiplier(step))
        return float(self.noise_multiplier)

    def ledger(self, steps: int | None = None) -> Ledger:
        """What the first steps release, by default all of the plan's."""
        ledger = Ledger(relation=self.relation, accountant=self.accountant)
        count = self.steps if steps is None else steps
        if count < 0:
            raise ValueError(f"steps must be at least 0, got {count}.")
        if not callable(self.noise_multiplier):
            if count:
                ledger.record(self.noise_at(0), self.sampling, count)
            return ledger
        for step in range(count):
            ledger.record(self.noise_at(step), self.sampling)
        return ledger

    def epsilon(self, steps: int | None = None) -> float:
        """The epsilon of the first steps at the plan's delta, by default of all of them."""
        return self.ledger(steps).epsilon(self.delta)

    def __str__(self) -> str:
        size = f"{self.expected_batch_size:g}"
        if self.shuffled:
            batches = f"shuffled batches of {size} of {self.num_samples} samples"
        elif isinstance(self.sampling, FullBatch):
            batches = f"batches of all {self.num_samples} samples"
        else:
            most = "" if self.max_batch_size is None else f", at most {self.max_batch_size},"
            batches = f"Poisson batches of {size}{most} of {self.num_samples} samples (q = {self.sample_rate:g})"
        kind = "Gaussian" if self.grid is None else "discrete Gaussian"
        noise = (
            f"scheduled {kind} noise"
            if callable(self.noise_multiplier)
            else f"{kind} noise of {self.noise_multiplier:.2f} sensitivities"
        )
        return (
            f"(epsilon = {_rounded_up(self.epsilon())}, delta = {self.delta:g})-differentially private towards "
            f"{_RELATIONS[self.relation]}: {self.steps} steps on {batches}, {noise}, clipping norm "
            f"{self.max_grad_norm}, accountant {self.accountant}."
        )

    def _refuse_contradictions(self) -> None:
        if self.grid is not None and self.accountant != "rdp_integer":
            raise ValueError(
                f"grid={self.grid} has discrete Gaussian noise, for which accountant {self.accountant!r} is not "
                "proven; use accountant='rdp_integer' (docs/exact.md)."
            )
        if self.grid is not None and self.max_batch_size is not None:
            raise ValueError(
                f"max_batch_size={self.max_batch_size} cannot be accounted for with a grid; leave one of them out."
            )
        sampled = not self.shuffled and self.expected_batch_size < self.num_samples
        if self.grid is not None and sampled and self.relation is Relation.REPLACE_ONE:
            raise ValueError(
                "relation 'replace_one' under Poisson sampling cannot be accounted for with a grid; use "
                "'add_or_remove_one' or 'replace_special'."
            )
        if not self.shuffled:
            return
        if self.max_batch_size is not None:
            raise ValueError(
                f"max_batch_size={self.max_batch_size} cuts Poisson batches, but shuffled=True has batches of one "
                "size; leave one of them out."
            )
        if self.expected_batch_size != math.floor(self.expected_batch_size):
            raise ValueError(
                f"expected_batch_size must be a whole number with shuffled=True, got {self.expected_batch_size}."
            )
        if self.relation is Relation.ADD_OR_REMOVE_ONE:
            raise ValueError(
                "shuffled=True with relation 'add_or_remove_one': one sample more moves others into other batches, so "
                "the batches of neighbouring datasets differ in more than that sample. Use relation 'replace_one' or "
                "'replace_special', or Poisson batches (shuffled=False), which are amplified as well."
            )


_RELATIONS: Mapping[Relation, str] = {
    Relation.ADD_OR_REMOVE_ONE: "adding or removing one sample",
    Relation.REPLACE_ONE: "replacing one sample by any other",
    Relation.REPLACE_SPECIAL: "replacing one sample by a null sample",
}


def _count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer, at least 1, got {value!r}.")


def _rounded_up(epsilon: float) -> str:
    """Three digits, never less than it is."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    digits = max(0, 2 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon / unit * (1 - 1e-12)) * unit:.{digits}f}"
