"""The sentence that says what a plan promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clipgrad.accounting import FullBatch
from clipgrad.clipping import Relation

if TYPE_CHECKING:
    from clipgrad.plan import PrivacyPlan

_RELATIONS: Mapping[Relation, str] = {
    Relation.ADD_OR_REMOVE_ONE: "adding or removing one {unit}",
    Relation.REPLACE_ONE: "replacing one {unit} by any other",
    Relation.REPLACE_SPECIAL: "replacing one {unit} by a null {unit}",
}


def sentence(plan: PrivacyPlan) -> str:
    """Epsilon, delta, relation, and all that they rest on."""
    kind = "Gaussian" if plan.grid is None else "discrete Gaussian"
    noise = (
        f"scheduled {kind} noise"
        if callable(plan.noise_multiplier)
        else f"{kind} noise of {plan.noise_multiplier:.2f} sensitivities"
    )
    text = (
        f"(epsilon = {_rounded_up(plan.epsilon())}, delta = {plan.delta:g})-differentially private towards "
        f"{_RELATIONS[plan.relation].format(unit=plan.unit)}: {plan.steps} steps on {_batches(plan)}, {noise}, "
        f"clipping norm {plan.max_grad_norm}, accountant {plan.accountant}."
    )
    if plan.declared_sampling is None:
        return text
    return f"{text} Declared, not checked: {plan.declared_sampling.strip()}."


def _batches(plan: PrivacyPlan) -> str:
    size, units = f"{plan.expected_batch_size:g}", f"{plan.num_samples} {plan.unit}s"
    if plan.shuffled:
        return f"shuffled batches of {size} of {units}"
    if isinstance(plan.sampling, FullBatch):
        return f"batches of all {units}"
    most = "" if plan.max_batch_size is None else f", at most {plan.max_batch_size},"
    return f"Poisson batches of {size}{most} of {units} (q = {plan.sample_rate:g})"


def _rounded_up(epsilon: float) -> str:
    """Three digits, never less than it is."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    digits = max(0, 2 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon / unit * (1 - 1e-12)) * unit:.{digits}f}"
