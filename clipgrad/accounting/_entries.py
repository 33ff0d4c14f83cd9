"""This module defines the entries of a ledger: consecutive steps with the same numbers."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

from . import _checks
from ._sampling import CyclicPoisson, FixedSize, FullBatch, Poisson, Sampling, TruncatedPoisson

_KINDS = (Poisson, TruncatedPoisson, FixedSize, FullBatch, CyclicPoisson)
_DESCRIPTIONS = {kind.__name__: kind for kind in _KINDS}


@dataclass(frozen=True)
class Entry:
    """This class describes consecutive steps with the same numbers.

    Attributes:
        noise_multiplier: Standard deviation of the noise per unit of the relation's sensitivity.
        sampling: How the batches were sampled.
        steps: Number of steps.
        segment: Numbers the segments of ``FixedSize`` and ``CyclicPoisson`` steps; a new segment starts with a new
            pass, or with a new round of all groups.
        run: Name of the run of a plan that the steps belong to; empty without a plan.
        declared: How the batches were sampled, in the user's own words; empty if a loader of clipgrad sampled them.
    """

    noise_multiplier: float
    sampling: Sampling
    steps: int
    segment: int = 0
    run: str = ""
    declared: str = ""


def is_continuation(earlier: list[Entry], later: list[Entry]) -> bool:
    """Return whether ``later`` begins with ``earlier``; the last entry of ``earlier`` may have gained steps."""
    if not earlier:
        return True
    *whole, last = earlier
    if len(later) < len(earlier) or later[: len(whole)] != whole:
        return False
    grown = later[len(whole)]
    return replace(grown, steps=last.steps) == last and grown.steps >= last.steps


def entry_state(entry: Entry) -> list[Any]:
    """Return an entry as strings, lists and numbers."""
    sampling = entry.sampling
    drawn = [type(sampling).__name__, list(astuple(sampling))]
    return [entry.noise_multiplier, *drawn, entry.steps, entry.segment, entry.run, entry.declared]


def entry_from(entry: Any) -> Entry:
    """Restore an entry from the result of ``entry_state``; ``Ledger.record`` checks its numbers."""
    match entry:
        case [noise, str(kind), list(numbers), steps, segment, str(run), str(declared)] if (
            kind in _DESCRIPTIONS
        ):
            try:
                sampling = _DESCRIPTIONS[kind](*numbers)
                segment = _checks.integer("segment", segment, least=0)
            except TypeError as error:
                raise ValueError(f"state has a history entry {entry!r}: {error}") from error
            return Entry(noise, sampling, steps, segment, run, declared)
    raise ValueError(
        f"state has a history entry {entry!r}; it must be noise multiplier, kind of sampling, its numbers, steps, "
        "segment, run and declaration."
    )
