"""The entries of a ledger: consecutive steps with the same numbers."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

from . import _checks
from ._sampling import FixedSize, FullBatch, Poisson, Sampling, TruncatedPoisson

_DESCRIPTIONS = {kind.__name__: kind for kind in (Poisson, TruncatedPoisson, FixedSize, FullBatch)}


@dataclass(frozen=True)
class Entry:
    """Consecutive steps with the same numbers.

    Attributes:
        noise_multiplier: Standard deviation of the noise per unit of the relation's sensitivity.
        sampling: How their batches were drawn.
        steps: How many they are.
        stretch: Numbers the stretches of ``FixedSize`` steps whose passes do not continue one another.
        run: Names the run of a plan that they belong to; empty without a plan.
        declared: How their batches were drawn, in the user's own words; empty if a loader of clipgrad drew them.
    """

    noise_multiplier: float
    sampling: Sampling
    steps: int
    stretch: int = 0
    run: str = ""
    declared: str = ""


def goes_on_from(earlier: list[Entry], later: list[Entry]) -> bool:
    """Whether a history begins with another one; its last entry may have grown."""
    if not earlier:
        return True
    *whole, last = earlier
    if len(later) < len(earlier) or later[: len(whole)] != whole:
        return False
    grown = later[len(whole)]
    return replace(grown, steps=last.steps) == last and grown.steps >= last.steps


def entry_state(entry: Entry) -> list[Any]:
    """An entry in strings, lists and numbers."""
    sampling = entry.sampling
    drawn = [type(sampling).__name__, list(astuple(sampling))]
    return [
        entry.noise_multiplier,
        *drawn,
        entry.steps,
        entry.stretch,
        entry.run,
        entry.declared,
    ]


def entry_from(entry: Any) -> Entry:
    """What ``entry_state`` wrote down; ``Ledger.record`` checks its numbers."""
    match entry:
        case [noise, str(kind), list(numbers), steps, stretch, str(run), str(declared)] if (
            kind in _DESCRIPTIONS
        ):
            try:
                sampling = _DESCRIPTIONS[kind](*numbers)
                stretch = _checks.integer("stretch", stretch, least=0)
            except TypeError as error:
                raise ValueError(f"state has a history entry {entry!r}: {error}") from error
            return Entry(noise, sampling, steps, stretch, run, declared)
    raise ValueError(
        f"state has a history entry {entry!r}; it must be noise multiplier, kind of sampling, its numbers, steps, "
        "stretch, run and declaration."
    )
