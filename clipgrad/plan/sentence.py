"""Write the parts of the sentence that a printed ``PrivacyPlan`` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from clipgrad.accounting import CyclicPoisson, FullBatch, Sampling
from clipgrad.clipping import Relation, Schedule
from clipgrad.plan.correlated import Mechanism

RELATIONS: Mapping[Relation, str] = {
    Relation.ADD_OR_REMOVE_ONE: "adding or removing one {unit}",
    Relation.REPLACE_ONE: "replacing one {unit} by any other",
    Relation.REPLACE_SPECIAL: "replacing one {unit} by a null {unit}",
}


def describe_noise(
    noise_multiplier: float | Schedule, *, discrete: bool, mechanism: Mechanism | None
) -> str:
    kind = "discrete Gaussian" if discrete else "Gaussian"
    noise = (
        f"scheduled {kind} noise"
        if callable(noise_multiplier)
        else f"{kind} noise of {noise_multiplier:.2f} sensitivities"
    )
    if mechanism is None:
        return noise
    return f"{noise}, correlated over {getattr(mechanism, 'bands', 'all')} steps"


def describe_batches(
    sampling: Sampling,
    *,
    size: float,
    units: str,
    sample_rate: float,
    most: int | None,
    shuffled: bool,
    in_one_order: bool,
) -> str:
    if shuffled:
        once = ", in one order for all passes" if in_one_order else ""
        return f"shuffled batches of {size:g} of {units}{once}"
    if isinstance(sampling, FullBatch):
        return f"batches of all {units}"
    if isinstance(sampling, CyclicPoisson):
        return (
            f"cyclic Poisson batches of {size:g} of {units} (each in every {sampling.bands}th step with "
            f"q = {sampling.sample_rate:g})"
        )
    limit = "" if most is None else f", at most {most},"
    return f"Poisson batches of {size:g}{limit} of {units} (q = {sample_rate:g})"


def round_up(epsilon: float) -> str:
    """Return epsilon as text with three significant digits, rounded up."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    digits = max(0, 2 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon / unit * (1 - 1e-12)) * unit:.{digits}f}"
