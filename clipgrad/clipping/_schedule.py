"""This module tracks the step of a run, and the clipping norm and noise at that step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from clipgrad import _validate
from clipgrad.clipping._adaptive import AdaptiveQuantile
from clipgrad.clipping._relation import Relation
from clipgrad.clipping._strategies import (
    Automatic,
    ClippingStrategy,
    Norm,
    PerLayer,
    Schedule,
    copy_strategy,
    with_norms,
)
from clipgrad.result import Outcome


@dataclass(frozen=True, eq=False)
class StepState:
    """This class describes one step of a run. It is immutable: the next step is another object.

    The result of a function of the step is cached, so that the function runs at most once per step. Norm and noise are
    thus the same for a whole logical batch and for the record of the step.

    Attributes:
        strategy: The clipping strategy as the user gave it.
        multiplier: The noise multiplier as the user gave it.
        step: Number of steps before this one.
        norm: The norm of ``AdaptiveQuantile`` at this step; None without it.
    """

    strategy: ClippingStrategy
    multiplier: float | Schedule
    step: int = 0
    norm: float | None = None

    @classmethod
    def start(cls, strategy: ClippingStrategy, noise_multiplier: float | Schedule) -> StepState:
        """Return the state before the first step.

        Raises:
            ValueError: If the noise multiplier is not a number, or ``AdaptiveQuantile`` is given per group.
        """
        strategy = copy_strategy(strategy)
        _refuse_adaptive_groups(strategy)
        quantile = _adaptive(strategy)
        norm = None if quantile is None else float(quantile.initial_norm)
        return cls(strategy, _multiplier(noise_multiplier), norm=norm)

    @cached_property
    def max_grad_norm(self) -> ClippingStrategy:
        """Return the strategy of this step, in which every norm is a number."""
        return with_norms(self.strategy, self._number)

    @cached_property
    def noise_multiplier(self) -> float:
        """Return the noise multiplier of everything that this step releases."""
        if callable(self.multiplier):
            return _validate.number(
                f"noise_multiplier at step {self.step}", self.multiplier(self.step)
            )
        return self.multiplier

    def with_noise_multiplier(self, noise_multiplier: float | Schedule) -> StepState:
        """Return the same step with another noise multiplier and the same norm."""
        other = replace(self, multiplier=_multiplier(noise_multiplier))
        if "max_grad_norm" in vars(self):
            vars(other)["max_grad_norm"] = self.max_grad_norm
        return other

    def noise(self, relation: Relation, expected_batch_size: float) -> tuple[float, float]:
        """Return the noise multiplier of the gradients, and the standard deviation of the noise on ``observed_sums``.

        Raises:
            ValueError: If there is no such noise.
        """
        quantile = _adaptive(self.strategy)
        if quantile is None:
            return self.noise_multiplier, 0.0
        return quantile.noise(self.noise_multiplier, relation, expected_batch_size)

    def observed_sums(self, outcome: Outcome) -> list[Tensor]:
        """Return the sums over samples that the next norm depends on; they need noise like the gradients.

        The list is empty except for ``AdaptiveQuantile``: then it holds the scalar ``sum_i (b_i - 1/2)`` over all
        samples except padding.
        """
        if self.norm is None:
            return []
        (norms,) = outcome.norms
        above = outcome.num_clipped + outcome.num_nonfinite
        # The norms' dtype is at least float32, which represents counts exactly up to 2^24.
        return [outcome.batch_size / 2 - above.to(norms.dtype)]

    def next_step(self, observed: Sequence[Tensor], expected_batch_size: float) -> StepState:
        """Return the next step, from ``observed_sums`` with their noise and the public expected batch size."""
        norm = self.norm
        quantile = _adaptive(self.strategy)
        if norm is not None and quantile is not None:
            norm = quantile.updated(norm, float(observed[0]), expected_batch_size)
        return replace(self, step=self.step + 1, norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """Return step and norm as plain numbers, for ``weights_only=True``."""
        return {"step": self.step, "norm": self.norm}

    def restored(self, state: Any) -> StepState:
        """Return the step that ``state_dict`` of the same run saved.

        Raises:
            ValueError: If ``state`` is malformed, or belongs to a run with another kind of norm.
        """
        if not isinstance(state, Mapping) or state.keys() != {"step", "norm"}:
            raise ValueError(
                f"state_dict: the progress must hold 'step' and 'norm', got {state!r}; load what "
                "DPOptimizer.state_dict() returned."
            )
        step, norm = state["step"], state["norm"]
        if type(step) is not int or step < 0:
            raise ValueError(f"state_dict: step must be an integer, at least 0, got {step!r}.")
        if (norm is None) != (self.norm is None):
            raise ValueError(
                f"state_dict: the norm is {norm!r}, but max_grad_norm is {self.strategy!r}; AdaptiveQuantile continues "
                "from a run with AdaptiveQuantile only. Build the optimizer as it was when it was saved."
            )
        if norm is not None and not (type(norm) is float and math.isfinite(norm) and norm > 0):
            raise ValueError(f"state_dict: norm must be a positive finite float, got {norm!r}.")
        return replace(self, step=step, norm=norm)

    def _number(self, norm: Norm) -> float:
        if isinstance(norm, AdaptiveQuantile):
            assert self.norm is not None
            if not (math.isfinite(self.norm) and self.norm > 0):
                raise ValueError(
                    f"max_grad_norm: AdaptiveQuantile has moved the norm to {self.norm} at step {self.step}. Lower its "
                    "learning_rate or count_stddev, or choose a target_quantile that the norms can reach."
                )
            return self.norm
        if callable(norm):
            return _validate.number(f"max_grad_norm at step {self.step}", norm(self.step))
        return norm


def _multiplier(noise_multiplier: float | Schedule) -> float | Schedule:
    if callable(noise_multiplier):
        return noise_multiplier
    return _validate.number("noise_multiplier", noise_multiplier)


def _adaptive(strategy: ClippingStrategy) -> AdaptiveQuantile | None:
    inner = strategy.max_grad_norm if isinstance(strategy, Automatic) else strategy
    return inner if isinstance(inner, AdaptiveQuantile) else None


def _refuse_adaptive_groups(strategy: ClippingStrategy) -> None:
    groups = list(strategy.values()) if isinstance(strategy, Mapping) else []
    if isinstance(strategy, PerLayer):
        groups = [strategy.max_grad_norm]
    if any(_adaptive(group) is not None for group in groups):
        raise ValueError(
            "max_grad_norm: AdaptiveQuantile adapts one norm for the whole gradient; a norm of its own for each group "
            "is not supported. Use it without PerLayer and without a mapping."
        )
