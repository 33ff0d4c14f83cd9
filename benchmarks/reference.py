"""The reference tables that started the project: JAX on a CPU, percent of its own standard step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A row of the reference.

    Attributes:
        workload: Our name of it.
        input: Its name there.
        batch_size: Samples a step.
        percents: Clipped speed by microbatch share; None: that run never finished.
    """

    workload: str
    input: str
    batch_size: int
    percents: Mapping[str, float | None]


REFERENCE = (
    Entry("cnn-small", "32x32x3", 32, {"batch": 18.3, "batch/4": 17.0, "1": 14.5}),
    Entry("cnn-small", "32x32x3", 64, {"batch": 19.2, "batch/4": 15.0, "1": 12.8}),
    Entry("cnn-medium", "64x64x3", 32, {"batch": None, "batch/4": None, "1": None}),
)
