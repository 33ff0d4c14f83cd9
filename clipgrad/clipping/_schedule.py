"""Where a run stands: the step, and what clipping norm and noise are at that step."""

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
    Schedule,
    is_grouped,
    with_norms,
)
from clipgrad.result import Outcome


@dataclass(frozen=True, eq=False)
class Progress:
    """A step of a run; the next step is another value.

    What a function of the step returned is kept: it is asked at most once a step, so that norm and noise are the same
    for all of a logical batch and for whoever writes them down.

    Attributes:
        strategy: As the user gave it.
        multiplier: The noise multiplier, as the user gave it.
        step: How many steps came before.
        norm: The norm of ``AdaptiveQuantile`` at this step; None without it.
    """

    strategy: ClippingStrategy
    multiplier: float | Schedule
    step: int = 0
    norm: float | None = None

    @classmethod
    def start(cls, strategy: ClippingStrategy, noise_multiplier: float | Schedule) -> Progress:
        """Before the first step.

        Raises:
            ValueError: If the noise multiplier is no number, or ``AdaptiveQuantile`` is asked for by group.
        """
        if isinstance(strategy, Mapping):
            strategy = dict(strategy)
        _refuse_adaptive_groups(strategy)
        quantile = _adaptive(strategy)
        norm = None if quantile is None else float(quantile.initial_norm)
        return cls(strategy, _multiplier(noise_multiplier), norm=norm)

    @cached_property
    def max_grad_norm(self) -> ClippingStrategy:
        """The strategy with every norm a number: that of this step."""
        return with_norms(self.strategy, self._number)

    @cached_property
    def noise_multiplier(self) -> float:
        """That of this step, for all that is released in it."""
        if callable(self.multiplier):
            return _validate.number(
                f"noise_multiplier at step {self.step}", self.multiplier(self.step)
            )
        return self.multiplier

    def with_noise_multiplier(self, noise_multiplier: float | Schedule) -> Progress:
        """The same step with other noise; the norm stays what it is."""
        other = replace(self, multiplier=_multiplier(noise_multiplier))
        if "max_grad_norm" in vars(self):
            vars(other)["max_grad_norm"] = self.max_grad_norm
        return other

    def noise(self, relation: Relation, expected_batch_size: float) -> tuple[float, float]:
        """The noise multiplier of the gradients, and the standard deviation of the noise on ``observed``.

        Raises:
            ValueError: If there is no such noise.
        """
        quantile = _adaptive(self.strategy)
        if quantile is None:
            return self.noise_multiplier, 0.0
        return quantile.noise(self.noise_multiplier, relation, expected_batch_size)

    def observed(self, outcome: Outcome) -> list[Tensor]:
        """What the next norm depends on, a sum over samples that needs noise like the gradients; often nothing.

        For ``AdaptiveQuantile`` the scalar ``sum_i (b_i - 1/2)`` over all samples but padding.
        """
        if self.norm is None:
            return []
        (norms,) = outcome.norms
        above = outcome.num_clipped + outcome.num_nonfinite
        # The norms' dtype is at least float32, in which counts are exact up to 2^24.
        return [outcome.batch_size / 2 - above.to(norms.dtype)]

    def advanced(self, observed: Sequence[Tensor], expected_batch_size: float) -> Progress:
        """The next step.

        Args:
            observed: The sums of ``observed``, with their noise.
            expected_batch_size: The public constant.
        """
        norm = self.norm
        quantile = _adaptive(self.strategy)
        if norm is not None and quantile is not None:
            norm = quantile.updated(norm, float(observed[0]), expected_batch_size)
        return replace(self, step=self.step + 1, norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """Step and norm: plain numbers, for ``weights_only=True``."""
        return {"step": self.step, "norm": self.norm}

    def restored(self, state: Any) -> Progress:
        """The step that ``state_dict`` saved, of this run.

        Raises:
            ValueError: If the state is not one, or of a run with another kind of norm.
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
    found: list[Norm] = []

    def look(norm: Norm) -> float:
        found.append(norm)
        return 1.0

    if not is_grouped(strategy):
        return
    with_norms(strategy, look)
    if any(isinstance(norm, AdaptiveQuantile) for norm in found):
        raise ValueError(
            "max_grad_norm: AdaptiveQuantile adapts one norm for the whole gradient; a norm of its own for each group "
            "is not supported. Use it without PerLayer and without a mapping."
        )
