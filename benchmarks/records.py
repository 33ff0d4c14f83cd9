"""What a run leaves behind: rows of cells, as JSON and as ratios."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Ratio:
    """Speed relative to another mode of the same row; 1 is equally fast.

    Attributes:
        value: Ratio of the median times.
        low: First quartile of the ratios round by round.
        high: Third quartile of them.
    """

    value: float
    low: float
    high: float

    @property
    def percent(self) -> str:
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f}-{100 * self.high:.0f})"


@dataclass
class Cell:
    """One mode of a row.

    Attributes:
        key: The mode's.
        label: The mode's.
        kind: ``"standard"``, ``"clipgrad"`` or ``"peer"``.
        microbatch: Samples per forward pass.
        share: ``"batch"``, ``"batch/4"`` or ``"1"``.
        compiled: Whether the step was compiled.
        seconds: One time per round; empty if it could not be measured.
        first_step_s: Seconds of the first step, with its compilation.
        peak_bytes: Peak memory of a step, weights, optimizer state and batch included.
        check: None: its clipped gradient is the oracle's. Else how it differs, or that it was not asked.
        reason: Why there is no time.
        memory_reason: Why there is no peak.
    """

    key: str
    label: str
    kind: str
    microbatch: int
    share: str
    compiled: bool
    seconds: list[float] = field(default_factory=list)
    first_step_s: float | None = None
    peak_bytes: int | None = None
    check: str | None = None
    reason: str | None = None
    memory_reason: str | None = None

    @property
    def median_s(self) -> float:
        return median(self.seconds)


@dataclass
class Row:
    """A workload at a batch size on a device, all its modes measured together.

    Attributes:
        sweep: A further batch size, measured at microbatch = batch only: a point of a chart, not a table.
    """

    workload: str
    description: str
    batch_size: int
    device: str
    cells: list[Cell]
    environment: dict[str, str]
    wall_s: float = 0.0
    sweep: bool = False

    @property
    def key(self) -> str:
        return f"{self.workload}-{self.batch_size}"

    @property
    def measured(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.seconds]

    def baseline(self, share: str = "batch") -> Cell:
        """The fastest standard variant; of those that accumulate, for another share than the whole batch."""
        candidates = self.of("standard", share)
        if not candidates:
            raise LookupError(f"{self.key}: no standard step was measured at microbatch = {share}")
        return min(candidates, key=lambda cell: cell.median_s)

    def memory_baseline(self) -> Cell | None:
        """The leanest ordinary step on the whole batch."""
        found = [cell for cell in self.of("standard", "batch") if cell.peak_bytes]
        return min(found, key=lambda cell: cell.peak_bytes or 0, default=None)

    @property
    def tabulated(self) -> bool:
        """Whether the row is a table of its own: no point of a chart, and there is something to compare with."""
        return not self.sweep and bool(self.of("standard", "batch"))

    def of(self, kind: str, share: str | None = None) -> list[Cell]:
        return [cell for cell in self.measured if cell.kind == kind and share in (None, cell.share)]

    def best(self, kind: str, share: str | None = None) -> Cell | None:
        return min(self.of(kind, share), key=lambda cell: cell.median_s, default=None)

    def throughput(self, cell: Cell) -> float:
        """Samples per second."""
        return self.batch_size / cell.median_s


def speed(cell: Cell, than: Cell) -> Ratio:
    """How fast ``cell`` is beside ``than``, from the rounds that have both."""
    both = list(zip(cell.seconds, than.seconds, strict=False))
    rounds = [theirs / ours for ours, theirs in both]
    low, _, high = quantiles(rounds, n=4) if len(rounds) > 1 else (rounds[0],) * 3
    value = median(theirs for _, theirs in both) / median(ours for ours, _ in both)
    return Ratio(value, min(low, value), max(high, value))


def load(path: Path) -> dict[str, Row]:
    """Rows by key; none if there is no such file."""
    if not path.exists():
        return {}
    stored: dict[str, Any] = json.loads(path.read_text())
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {stored.get('format')!r}, this code reads {FORMAT}; measure anew, or "
            "use the code of the commit that wrote it."
        )
    rows = [
        Row(**{**row, "cells": [Cell(**cell) for cell in row["cells"]]}) for row in stored["rows"]
    ]
    return {row.key: row for row in rows}


def save(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"format": FORMAT, "rows": [_rounded(asdict(row)) for row in rows]}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def in_order(rows: Iterable[Row], workloads: Sequence[str]) -> list[Row]:
    """Rows in the order of the workloads, small batches first."""
    known = [row for row in rows if row.workload in workloads]
    return sorted(known, key=lambda row: (workloads.index(row.workload), row.batch_size))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    for cell in row["cells"]:
        cell["seconds"] = [float(f"{value:.5g}") for value in cell["seconds"]]
    return row
