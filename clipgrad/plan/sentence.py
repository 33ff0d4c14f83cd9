"""This file holds the sentence that a printed ``PrivacyPlan`` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clipgrad.accounting import CyclicPoisson, FullBatch
from clipgrad.clipping import Relation

if TYPE_CHECKING:
    from clipgrad.plan.privacy_plan import PrivacyPlan

_RELATIONS: Mapping[Relation, str] = {
    Relation.ADD_OR_REMOVE_ONE: "adding or removing one {unit}",
    Relation.REPLACE_ONE: "replacing one {unit} by any other",
    Relation.REPLACE_SPECIAL: "replacing one {unit} by a null {unit}",
}


def describe(plan: PrivacyPlan) -> str:
    """Return the guarantee of a plan as a sentence, with epsilon rounded up."""
    kind = "Gaussian" if plan.grid is None else "discrete Gaussian"
    noise = (
        f"scheduled {kind} noise"
        if callable(plan.noise_multiplier)
        else f"{kind} noise of {plan.noise_multiplier:.2f} sensitivities"
    )
    if plan.mechanism is not None:
        bands = getattr(plan.mechanism, "bands", "all")
        noise += f", correlated over {bands} steps"
    text = (
        f"(epsilon = {_round_up(plan.epsilon())}, delta = {plan.delta:g})-differentially private towards "
        f"{_RELATIONS[plan.relation].format(unit=plan.unit)}: {plan.steps} steps on {_describe_batches(plan)}, "
        f"{noise}, clipping norm {plan.max_grad_norm}, accountant {plan.accountant}."
    )
    if plan.mechanism is not None:
        text += (
            " Epsilon holds for the run as a whole: one sequence of noise, which a restart must continue from a "
            "checkpoint that is kept secret."
        )
    if plan.declared_sampling is None:
        return text
    return f"{text} Declared, not checked: {plan.declared_sampling.strip()}."


def _describe_batches(plan: PrivacyPlan) -> str:
    size, units = f"{plan.expected_batch_size:g}", f"{plan.num_samples} {plan.unit}s"
    if plan.shuffled:
        once = "" if plan.mechanism is None else ", in one order for all passes"
        return f"shuffled batches of {size} of {units}{once}"
    if isinstance(plan.sampling, FullBatch):
        return f"batches of all {units}"
    if isinstance(plan.sampling, CyclicPoisson):
        return (
            f"cyclic Poisson batches of {size} of {units} (each in every {plan.sampling.bands}th step with "
            f"q = {plan.sampling.sample_rate:g})"
        )
    most = "" if plan.max_batch_size is None else f", at most {plan.max_batch_size},"
    return f"Poisson batches of {size}{most} of {units} (q = {plan.sample_rate:g})"


def _round_up(epsilon: float) -> str:
    """Return epsilon with three digits, rounded up."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    digits = max(0, 2 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon / unit * (1 - 1e-12)) * unit:.{digits}f}"
