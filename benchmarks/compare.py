"""Has clipgrad become slower relative to the ordinary step? Ratios of two runs, beyond their spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.records import Cell, Ratio, Row, speed


@dataclass
class Findings:
    """What the comparison of two runs says, a line each.

    Attributes:
        worse: Ratios of clipgrad whose whole spread lies below the earlier one's.
        better: Those whose spread lies above it.
        same: Those that overlap.
        missing: What only one of the two runs has.
    """

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            *(f"WORSE    {line}" for line in self.worse),
            *(f"better   {line}" for line in self.better),
            *(f"the same {line}" for line in self.same),
            *(f"not compared: {line}" for line in self.missing),
        ]


def regressions(before: Mapping[str, Row], now: Mapping[str, Row]) -> Findings:
    """Compare clipgrad's speed relative to the same standard step in two runs.

    Absolute times differ between machines and hours, so only ratios within one run are compared, and with the same
    variant of the standard step in both: the fastest one may have changed sides by noise.
    """
    findings = Findings()
    for key, row in now.items():
        if key not in before:
            findings.missing.append(f"{key}: the earlier run has no such row")
            continue
        earlier = {cell.key: cell for cell in before[key].measured}
        reference = before[key].baseline().key
        standard = {cell.key: cell for cell in row.measured}.get(reference)
        if standard is None:
            findings.missing.append(f"{key}: {reference} was not measured now")
            continue
        for cell in row.of("clipgrad"):
            if cell.key not in earlier:
                findings.missing.append(f"{key} {cell.key}: the earlier run has no such mode")
                continue
            old = speed(earlier[cell.key], earlier[reference])
            _judge(findings, f"{key} {cell.key}", old, speed(cell, standard))
        for cell in row.cells:
            if cell.kind == "clipgrad" and not cell.seconds and cell.key in earlier:
                findings.worse.append(f"{key} {cell.key}: {cell.reason}")
    return findings


def _judge(findings: Findings, name: str, old: Ratio, new: Ratio) -> None:
    line = f"{name}: {old.percent} -> {new.percent} of the standard step"
    if new.high < old.low:
        findings.worse.append(line)
    elif new.low > old.high:
        findings.better.append(line)
    else:
        findings.same.append(line)


__all__ = ["Cell", "Findings", "regressions"]
