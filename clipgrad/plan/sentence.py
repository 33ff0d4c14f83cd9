"""Write the sentence that a printed ``PrivacyPlan`` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from clipgrad.accounting import CyclicPoisson, FullBatch
from clipgrad.clipping import Relation
from clipgrad.plan.settings import PlanSettings

RELATIONS: Mapping[Relation, str] = {
    Relation.ADD_OR_REMOVE_ONE: "adding or removing one {unit}",
    Relation.REPLACE_ONE: "replacing one {unit} by any other",
    Relation.REPLACE_SPECIAL: "replacing one {unit} by a null {unit}",
}


def sentence_of(plan: PlanSettings, epsilon: float) -> str:
    """Return the sentence that describes a plan whose run costs ``epsilon``."""
    steps = f"{plan.steps} step{'s' * (plan.steps != 1)}"
    text = (
        f"(epsilon = {round_up(epsilon)}, delta = {plan.delta:g})-differentially private towards "
        f"{RELATIONS[plan.relation].format(unit=plan.unit)}: {steps} on {_batches(plan)}, {_noise(plan)}, "
        f"clipping norm {plan.max_grad_norm}, accountant {plan.accountant}."
    )
    if plan.mechanism is not None:
        text += (
            " Epsilon holds for the run as a whole: one sequence of noise, which a restart must continue from a "
            "checkpoint that is kept secret."
        )
    if plan.declared_sampling is None:
        return text
    return f"{text} Declared, not checked: {plan.declared_sampling.strip()}."


def _noise(plan: PlanSettings) -> str:
    kind = "Gaussian" if plan.grid is None else "discrete Gaussian"
    noise = (
        f"scheduled {kind} noise"
        if callable(plan.noise_multiplier)
        else f"{kind} noise of {plan.noise_multiplier:.2f} sensitivities"
    )
    if plan.mechanism is None:
        return noise
    return f"{noise}, correlated over {getattr(plan.mechanism, 'bands', 'all')} steps"


def _batches(plan: PlanSettings) -> str:
    size, units = plan.expected_batch_size, f"{plan.num_samples} {plan.unit}s"
    if plan.shuffled:
        once = "" if plan.mechanism is None else ", in one order for all passes"
        return f"shuffled batches of {size:g} of {units}{once}"
    sampling, most = plan.sampling, plan.max_batch_size
    if isinstance(sampling, FullBatch):
        return f"batches of all {units}"
    if isinstance(sampling, CyclicPoisson):
        return (
            f"cyclic Poisson batches of {size:g} of {units} (each in every {sampling.bands}th step with "
            f"q = {sampling.sample_rate:g})"
        )
    limit = "" if most is None else f", at most {most},"
    return f"Poisson batches of {size:g}{limit} of {units} (q = {plan.sample_rate:g})"


def round_up(epsilon: float) -> str:
    """Return epsilon as text with three significant digits, rounded up."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    digits = max(0, 2 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon / unit * (1 - 1e-12)) * unit:.{digits}f}"
