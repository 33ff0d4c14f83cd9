"""This module holds the part of ``DPOptimizer`` that its privacy depends on: mechanism, noise, step and ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from clipgrad.accounting import Ledger
from clipgrad.batch import BatchClipper
from clipgrad.clipping import ClippingStrategy, Relation, Schedule, StepState, copy_strategy
from clipgrad.noise import NoiseSource
from clipgrad.optimizer.facade import OptimizerFacade
from clipgrad.optimizer.mechanism import (
    Mechanism,
    check_source,
    make_step_noise,
    refuse_adaptive_on_grid,
)
from clipgrad.plan import PrivacyPlan
from clipgrad.plan.account import Account

_STATE_KEY = "clipgrad"


class PrivacyState(OptimizerFacade):
    """This class says what a step of ``DPOptimizer`` releases, and saves and restores the state behind it.

    Args:
        optimizer: The optimizer to wrap.
        mechanism: The numbers that privacy depends on.
        clipper: Computes clipped sums, and the sensitivity.
        noise: The noise source that the user gave, or None.
        plan: The plan that the user gave, or None.

    Raises:
        ValueError: If noise, plan or clipping norm do not fit together.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mechanism: Mechanism,
        clipper: BatchClipper,
        noise: NoiseSource | None,
        plan: PrivacyPlan | None,
    ) -> None:
        # Optimizer.__init__ is not called: param_groups, state and hooks are the wrapped optimizer's.
        self.inner = optimizer
        self._mechanism = mechanism
        self._step_state = StepState.start(mechanism.max_grad_norm, mechanism.noise_multiplier)
        self._clipper = clipper
        self._noise = make_step_noise(
            noise, clipper.arithmetic, mechanism.expected_batch_size, plan
        )
        self._account = None if plan is None else Account(plan, self._noise.accounting)
        refuse_adaptive_on_grid(self._step_state, clipper.arithmetic)
        clipper.arithmetic.clipping(self.max_grad_norm)

    @property
    def noise(self) -> NoiseSource:
        """Return the noise source; another source may be set if it fits."""
        return self._noise.source

    @noise.setter
    def noise(self, noise: NoiseSource) -> None:
        source = check_source(noise, self._clipper.arithmetic, self.expected_batch_size)
        self._noise.change_source(source)
        self._clipper.ranks.compare_soon()

    @property
    def expected_batch_size(self) -> float:
        """Return the public constant by which sums are divided."""
        return self._mechanism.expected_batch_size

    @property
    def relation(self) -> Relation:
        """Return the neighbouring relation for which the noise is calibrated."""
        return self._mechanism.relation

    @property
    def sensitivity(self) -> float:
        """Return the largest L2 change of the clipped sum between neighbouring datasets."""
        return self._clipper.sensitivity(self._norm(), self.relation)

    @property
    def sigma(self) -> float:
        """Return the standard deviation of the noise on the clipped sum at this step.

        It is ``noise_multiplier * sensitivity``, or slightly more with ``AdaptiveQuantile``, whose count needs noise.
        With a ``BandedFactorisation`` it is the deviation of the independent noise from which correlated noise is made,
        for a matrix whose columns have norm 1.
        """
        return self._clipper.arithmetic.sigma(self._noise_levels()[0], self.sensitivity)

    @property
    def noise_multiplier(self) -> float:
        """Return the noise per unit of sensitivity at this step; a number or a function of the step may be set."""
        return self._step_state.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, noise_multiplier: float | Schedule) -> None:
        if self._account is not None:
            raise ValueError(
                "noise_multiplier belongs to the plan, whose epsilon would not hold any more. Give the plan a function "
                "of the step, or continue with another plan: a new DPOptimizer with "
                "plan=another_plan.continuing(optimizer.ledger)."
            )
        self._step_state = self._step_state.with_noise_multiplier(noise_multiplier)

    @property
    def accounted_noise_multiplier(self) -> float:
        """Return the noise multiplier of this step for the accountant.

        The step costs as much as one Gaussian mechanism with this noise multiplier. With ``AdaptiveQuantile`` this
        covers the clipped sum and the count together.
        """
        return self._step_state.noise_multiplier

    @property
    def ledger(self) -> Ledger:
        """Return the record of all steps so far.

        Raises:
            RuntimeError: Without a plan, because the sampling of the batches is unknown.
        """
        if self._account is None:
            raise RuntimeError(
                "ledger: this optimizer was built without a plan, so it does not know how batches are sampled. Pass "
                "plan=clipgrad.PrivacyPlan(...), or keep a clipgrad.accounting.Ledger yourself."
            )
        return self._account.ledger

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon of all steps so far.

        Args:
            delta: Probability with which epsilon may fail to hold; by default the plan's.

        Raises:
            RuntimeError: Without a plan.
        """
        if delta is None and self._account is not None:
            delta = self._account.plan.delta
        return self.ledger.epsilon(math.nan if delta is None else delta)

    @property
    def max_grad_norm(self) -> ClippingStrategy:
        """Return the clipping norm at this step, in which every norm is a number."""
        return copy_strategy(self._norm())

    @property
    def secret_state(self) -> str:
        """Return why :meth:`state_dict` must stay secret; empty if it reveals nothing that is not public already."""
        return self._noise.secret

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer, of the noise source and of the step.

        It loads with ``weights_only=True``, and does not contain an unfinished logical batch.
        """
        return {**self.inner.state_dict(), _STATE_KEY: self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        own = {"noise": self._noise.state_dict(), "progress": self._step_state.state_dict()}
        if self._account is not None:
            own["account"] = self._account.state_dict()
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved state, and discard an unfinished logical batch.

        The state of an ordinary optimizer loads too. A state without a step does not change the step and the norm of
        ``AdaptiveQuantile``.

        Raises:
            ValueError: If the state does not fit.
        """
        inner = {key: value for key, value in state_dict.items() if key != _STATE_KEY}
        self._load(state_dict.get(_STATE_KEY), lambda: self.inner.load_state_dict(inner))

    def _load(self, own: Mapping[str, Any] | None, load_inner: Callable[[], None]) -> None:
        step_state = self._step_state
        if own is not None and "progress" in own:
            step_state = step_state.restored(own["progress"])
        if self._account is not None:
            self._account.check(own, step_state.step)
        load_inner()
        if own is not None:
            self._noise.load_state_dict(own["noise"])
        self._step_state = step_state
        if own is not None and self._account is not None:
            self._account.load_state_dict(own)
        self._clipper.ranks.compare_soon()
        self.zero_grad()

    def _norm(self) -> ClippingStrategy:
        return self._step_state.max_grad_norm

    def _noise_levels(self) -> tuple[float, float]:
        """Return the noise multiplier of the gradients, and the standard deviation of the noise on the counts."""
        return self._step_state.noise(self.relation, self.expected_batch_size)
