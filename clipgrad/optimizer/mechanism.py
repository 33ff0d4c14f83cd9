"""This module collects the numbers on which the privacy of a ``DPOptimizer`` depends, from a plan or one by one."""

from __future__ import annotations

from typing import NamedTuple

from clipgrad import _validate
from clipgrad.arithmetic import Arithmetic
from clipgrad.clipping import ClippingStrategy, Relation, Schedule, StepState
from clipgrad.exact import DiscreteGaussianNoise
from clipgrad.noise import NoiseSource
from clipgrad.noise.correlated import CorrelatedNoise
from clipgrad.noise.step_noise import IndependentNoise, StepNoise
from clipgrad.plan import PrivacyPlan


class Mechanism(NamedTuple):
    """This tuple holds the numbers on which privacy depends."""

    max_grad_norm: ClippingStrategy
    noise_multiplier: float | Schedule
    expected_batch_size: float
    relation: Relation
    grid: float | None


def make_mechanism(
    plan: PrivacyPlan | None,
    max_grad_norm: ClippingStrategy | None,
    noise_multiplier: float | Schedule | None,
    expected_batch_size: float | None,
    noise: NoiseSource | None,
) -> Mechanism:
    """Return the numbers of a plan, or the given numbers if there is no plan.

    Raises:
        TypeError: If a number is missing.
        ValueError: If a plan and a number are given, or a number is out of range.
    """
    numbers = {
        "max_grad_norm": max_grad_norm,
        "noise_multiplier": noise_multiplier,
        "expected_batch_size": expected_batch_size,
    }
    grid = noise.grid if isinstance(noise, DiscreteGaussianNoise) else None
    if plan is not None and not isinstance(plan, PrivacyPlan):
        raise TypeError(f"plan must be a clipgrad.PrivacyPlan, got {type(plan).__name__}.")
    if plan is not None:
        if twice := [name for name, value in numbers.items() if value is not None]:
            raise ValueError(
                f"the plan sets {', '.join(twice)} already; leave it out, or make another plan."
            )
        if grid is not None and plan.grid is None:
            raise ValueError(
                f"noise={noise!r} is on a grid, but the plan accounts for continuous noise. Make the plan with "
                f"grid={grid}, or leave noise out."
            )
        return Mechanism(
            plan.max_grad_norm,
            plan.noise_multiplier,
            plan.expected_batch_size,
            plan.relation,
            plan.grid,
        )
    if missing := [name for name, value in numbers.items() if value is None]:
        raise TypeError(
            f"DPOptimizer needs {', '.join(missing)}: numbers on which privacy depends have no default. Or pass "
            "plan=clipgrad.PrivacyPlan(...)."
        )
    assert max_grad_norm is not None
    assert noise_multiplier is not None
    return Mechanism(
        max_grad_norm,
        noise_multiplier,
        _validate.positive("expected_batch_size", expected_batch_size),  # type: ignore[arg-type]
        Relation.ADD_OR_REMOVE_ONE,
        grid,
    )


def make_step_noise(
    noise: NoiseSource | None,
    arithmetic: Arithmetic,
    expected_batch_size: float,
    plan: PrivacyPlan | None,
) -> StepNoise:
    """Return the noise of a step, correlated if the plan says so, from the given source or the default source.

    Raises:
        ValueError: If ``noise`` is no noise source, or does not fit the arithmetic.
    """
    source = check_source(noise, arithmetic, expected_batch_size)
    strategy = None if plan is None else plan.strategy
    if plan is None or strategy is None:
        return IndependentNoise(source)
    return CorrelatedNoise(source, strategy, plan.noise_accounting)


def check_source(
    noise: NoiseSource | None, arithmetic: Arithmetic, expected_batch_size: float
) -> NoiseSource:
    """Return the given source of noise, or the default source.

    Raises:
        ValueError: If ``noise`` is no noise source, or does not fit the arithmetic.
    """
    if noise is not None and not callable(getattr(noise, "add_gaussian_", None)):
        raise ValueError(
            f"noise must be a NoiseSource such as clipgrad.SystemNoise(), got {noise!r}; noise_multiplier sets the "
            "amount of noise."
        )
    return arithmetic.noise_source(noise, expected_batch_size)


def refuse_adaptive_on_grid(step_state: StepState, arithmetic: Arithmetic) -> None:
    """Refuse an adaptive norm in exact mode, where the noise of its count would not be exact.

    Raises:
        ValueError: If the norm is adaptive and the arithmetic does not allow it.
    """
    if not arithmetic.allows_adaptive_norms and step_state.norm is not None:
        raise ValueError(
            f"grid cannot be combined with max_grad_norm={step_state.strategy!r}: the noise of its count would not be "
            "exact. Give a norm, or a function of the step."
        )
