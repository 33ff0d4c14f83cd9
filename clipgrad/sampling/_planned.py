"""Check that a plan accounts for the batches of a loader."""

from __future__ import annotations

from typing import Any

from clipgrad.accounting import CyclicPoisson
from clipgrad.plan import PrivacyPlan


def numbers_of_plan(
    plan: PrivacyPlan, unit: str, count: int, given: tuple[Any, ...]
) -> tuple[float, int | None, int]:
    """Return expected batch size, largest batch size and steps of a plan, after checking that it fits the data."""
    if any(value is not None for value in given):
        raise ValueError(
            "plan sets the size and number of batches; leave out the other arguments about them."
        )
    require_fit(plan, unit, count, shuffled=False)
    return plan.expected_batch_size, plan.max_batch_size, plan.steps


def bands_of(plan: PrivacyPlan | None) -> int | None:
    """Return the number of groups of a plan with correlated noise; None for plain Poisson batches."""
    sampling = None if plan is None else plan.sampling
    return sampling.bands if isinstance(sampling, CyclicPoisson) else None


def require_fit(plan: PrivacyPlan, unit: str, count: int, *, shuffled: bool) -> None:
    """Refuse a plan that accounts for other batches than those of the loader."""
    if not isinstance(plan, PrivacyPlan):
        raise TypeError(f"plan must be a clipgrad.PrivacyPlan, got {type(plan).__name__}.")
    if plan.unit != unit:
        raise ValueError(
            f"plan protects one {plan.unit}, but this loader samples {unit}s; make the plan with unit={unit!r}, or use "
            f"{'user_loader' if plan.unit == 'user' else 'poisson_loader'}."
        )
    if plan.num_samples != count:
        raise ValueError(
            f"plan is for {plan.num_samples} {unit}s, but there are {count}: the "
            "sampling rate, and so epsilon, would differ. Make the plan for this dataset."
        )
    if plan.shuffled != shuffled:
        right, kind = (
            ("shuffled_loader", "Poisson") if plan.shuffled else ("poisson_loader", "shuffled")
        )
        raise ValueError(
            f"plan has shuffled={plan.shuffled}, but this loader makes {kind} batches. Use "
            f"clipgrad.{right}(dataset, plan=plan)."
        )
    if plan.declared_sampling is not None:
        raise ValueError(
            "plan has declared_sampling, which is for batches that no loader of clipgrad makes. Leave it out: the "
            "batches of this loader are checked."
        )
