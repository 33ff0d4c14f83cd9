"""This file holds ``PrivacyPlan``, the description of a private run that sampler, optimizer and accountant share."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace

from clipgrad import accounting
from clipgrad.accounting import Ledger
from clipgrad.clipping import ClippingStrategy, Relation, Schedule
from clipgrad.factorisation import BandedFactorisation
from clipgrad.plan.checks import steps_of
from clipgrad.plan.correlated import Mechanism, best_bands, error_of
from clipgrad.plan.receipts import Receipts
from clipgrad.plan.run import Run
from clipgrad.plan.sentence import sentence_of
from clipgrad.plan.settings import PlanSettings


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan(PlanSettings):
    """A plan describes once how a private run samples, clips and adds noise, so that no two parts can disagree.

    ``poisson_loader(dataset, plan=plan)`` makes its batches; ``DPOptimizer(..., plan=plan)`` clips, adds the noise,
    keeps the ledger and refuses to take more steps than planned. It also refuses batches that the plan does not account
    for: a batch of no loader of this plan object, two batches in one step, or one batch in two steps.

    One plan object is one run. All loaders and optimizers that share it share its budget and its ledger. For a second
    training make a second plan, ``dataclasses.replace(plan)``.

    Args:
        num_samples: Size of the dataset; the number of users if batches consist of users.
        expected_batch_size: Mean size of a batch, and the public constant by which sums are divided. If it is
            ``num_samples``, every sample is in every batch.
        steps: Number of noisy steps of the run, including empty batches.
        delta: Probability with which epsilon may fail to hold; choose it well below ``1 / num_samples``.
        noise_multiplier: Noise standard deviation per unit of sensitivity, or a function of the step, which counts
            from 0.
        max_grad_norm: Clipping norm; see ``DPOptimizer``.
        max_batch_size: Largest size of a Poisson batch; larger batches are truncated, and the accountant covers this.
        shuffled: Whether batches have a fixed size, with each sample once an epoch, instead of Poisson batches. No
            amplification by sampling is claimed (Chua et al. 2024, arXiv:2403.17673), so epsilon is much larger; only
            for the relations ``REPLACE_ONE`` and ``REPLACE_SPECIAL``. ``shuffled_loader`` makes the batches.
        unit: The unit that is sampled, clipped and protected: ``"sample"``, or ``"user"`` with ``user_loader``.
        declared_sampling: A description of how batches are sampled, if no loader of clipgrad makes them. Nothing checks
            then that batches are sampled as the plan says. The text becomes part of the ledger and of ``str(plan)``.
        relation: The definition of neighbouring datasets.
        accountant: ``"pld"`` (tight), ``"rdp"`` (fast, for a progress bar) or, with a grid, ``"rdp_integer"``.
        grid: The spacing of the integer grid of exact mode; see ``DPOptimizer``.
        mechanism: ``BandedFactorisation(bands=...)`` correlates the noise over steps, so that at the same epsilon sums
            of gradients have less noise, and so does ``BufferedToeplitz`` for shuffled passes. None means independent
            noise. See ``docs/noise.md`` for the right choice for a run, and for what it excludes.

    Raises:
        ValueError: If a number is out of range, or the settings exclude each other.

    Warns:
        UserWarning: If ``delta >= 1 / num_samples``: a mechanism that publishes one whole sample has such a delta.

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

    run: Run = field(init=False, repr=False, compare=False)
    """The state of the run: batches handed out and steps released. Loaders and optimizers update it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_order = "shuffled" if self.shuffled else "cyclic" if self.mechanism is not None else ""
        object.__setattr__(self, "run", Run(receipts=Receipts(without_gaps=in_order)))
        if self.delta >= 1 / self.num_samples:
            warnings.warn(
                f"delta = {self.delta:g} is not below 1 / num_samples = {1 / self.num_samples:g}. A mechanism that "
                f"publishes a {self.unit} at random has such a delta; choose it much smaller, for example a tenth.",
                stacklevel=3,
            )

    @classmethod
    def for_epsilon(
        cls,
        target_epsilon: float,
        *,
        num_samples: int,
        expected_batch_size: float,
        delta: float,
        steps: int | None = None,
        epochs: float | None = None,
        max_grad_norm: ClippingStrategy = 1.0,
        max_batch_size: int | None = None,
        shuffled: bool = False,
        unit: str = "sample",
        declared_sampling: str | None = None,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        accountant: accounting.Accountant = "pld",
        grid: float | None = None,
        mechanism: Mechanism | None = None,
    ) -> PrivacyPlan:
        """Return the plan with the least noise that stays within ``target_epsilon``.

        Args:
            target_epsilon: The largest epsilon that is allowed, positive and finite.
            num_samples: See ``PrivacyPlan``.
            expected_batch_size: See ``PrivacyPlan``.
            delta: See ``PrivacyPlan``.
            steps: Number of noisy steps of the run; give it or ``epochs``.
            epochs: How often each sample is in a batch on average; the number of steps is
                ``epochs * num_samples / expected_batch_size``, rounded, at least 1.
            max_grad_norm: See ``PrivacyPlan``.
            max_batch_size: See ``PrivacyPlan``.
            shuffled: See ``PrivacyPlan``.
            unit: See ``PrivacyPlan``.
            declared_sampling: See ``PrivacyPlan``.
            relation: See ``PrivacyPlan``.
            accountant: See ``PrivacyPlan``.
            grid: See ``PrivacyPlan``.
            mechanism: See ``PrivacyPlan``. With ``bands="auto"`` the plan gets the number of bands with the least
                ``expected_error``, which takes some seconds to find.

        Raises:
            ValueError: If no noise multiplier meets the target, or every one does, or not exactly one of ``steps`` and
                ``epochs`` is given.
            ImportError: If ``dp-accounting`` is not installed.
        """
        if target_epsilon == math.inf:
            raise ValueError(
                "target_epsilon must be finite, got inf, which guarantees nothing. For a run without noise make "
                "PrivacyPlan(noise_multiplier=0.0, ...)."
            )
        count = steps_of(steps, epochs, num_samples, expected_batch_size)
        if isinstance(mechanism, BandedFactorisation) and mechanism.bands == "auto":
            mechanism = best_bands(
                mechanism,
                target_epsilon,
                num_samples=num_samples,
                expected_batch_size=expected_batch_size,
                steps=count,
                delta=delta,
                shuffled=shuffled,
            )
        plan = cls(
            num_samples=num_samples,
            expected_batch_size=expected_batch_size,
            steps=count,
            delta=delta,
            noise_multiplier=1.0,
            max_grad_norm=max_grad_norm,
            max_batch_size=max_batch_size,
            shuffled=shuffled,
            unit=unit,
            declared_sampling=declared_sampling,
            relation=relation,
            accountant=accountant,
            grid=grid,
            mechanism=mechanism,
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
        """Return a new plan that differs only in its noise."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # this plan has warned about delta already
            return replace(self, noise_multiplier=noise_multiplier)

    def continuing(self, ledger: Ledger) -> PrivacyPlan:
        """Return a new run of this plan whose steps are added to the ledger of an earlier training on the same data.

        Args:
            ledger: The ledger of the earlier training: ``optimizer.ledger``.

        Raises:
            ValueError: If ledger and plan differ in relation or accountant.

        Examples:
            >>> plan = PrivacyPlan(
            ...     num_samples=1000,
            ...     expected_batch_size=10,
            ...     steps=5,
            ...     delta=1e-5,
            ...     noise_multiplier=1.0,
            ... )
            >>> first = plan.ledger()
            >>> second = plan.continuing(first)
        """
        if not isinstance(ledger, Ledger):
            raise ValueError(
                f"ledger must be a clipgrad.accounting.Ledger, got {type(ledger).__name__}; pass optimizer.ledger of "
                "the earlier training, for example."
            )
        found, wanted = (ledger.relation, ledger.accountant), (self.relation.value, self.accountant)
        if found != wanted:
            raise ValueError(
                f"ledger counts with relation and accountant {found}, the plan with {wanted}: their epsilons do not "
                "add up. Make the plan with the relation and accountant of the ledger."
            )
        plan = self.with_noise(self.noise_multiplier)
        plan.run.ledger = ledger
        return plan

    def ledger(self, steps: int | None = None) -> Ledger:
        """Return the ledger of the first ``steps`` steps, by default of all steps of the plan."""
        ledger = Ledger(relation=self.relation, accountant=self.accountant)
        declared = self.declared_sampling or ""
        count = self.steps if steps is None else steps
        if count < 0:
            raise ValueError(f"steps must be at least 0, got {count}.")
        if not callable(self.noise_multiplier):
            if count:
                ledger.record(self.noise_at(0), self.sampling, count, declared=declared)
            return ledger
        for step in range(count):
            ledger.record(self.noise_at(step), self.sampling, declared=declared)
        return ledger

    def epsilon(self, steps: int | None = None) -> float:
        """Return the epsilon of the first ``steps`` steps at the plan's delta, by default of all steps."""
        return self.ledger(steps).epsilon(self.delta)

    def expected_error(self) -> float:
        """Return the noise in the sum of the gradients of all steps so far, as a root mean square over the run.

        It is the deviation in one coordinate, in sensitivities: noise in the sum of ``.grad`` over the first t steps,
        for t from 1 to ``steps``. Compare it between plans of the same epsilon, steps and norm: plain gradient descent
        moves by this sum. Momentum and adaptive optimizers weigh steps otherwise, and profit less or more.
        """
        noise = [self.noise_at(step) for step in range(self.steps)]
        return error_of(self.strategy, noise) / self.expected_batch_size

    def __str__(self) -> str:
        return sentence_of(self, self.epsilon())
