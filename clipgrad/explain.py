"""Explain the cost of a loss: one row per parameter, computed from a forward pass alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clipgrad.engine.norm_method import Choice
from clipgrad.engine.tracked import Tracked


@dataclass(frozen=True)
class ExplanationRow:
    """A row says how the per-sample gradient of one parameter, or expression of parameters, is computed.

    Attributes:
        parameter: The name; an expression is written as its operation and operands.
        shape: The shape of the parameter.
        uses: The number of uses in the loss.
        by: The rules that handle the uses, and ``fallback: op`` for operations without a rule.
        strategy: ``kept``, ``ghost``, or ``-`` if the loss does not use the parameter.
        reason: The reason for that strategy.
        memory: Estimated bytes that are held for the parameter between backward pass and clipped sum.
    """

    parameter: str
    shape: tuple[int, ...]
    uses: int
    by: str
    strategy: str
    reason: str
    memory: int


@dataclass(frozen=True)
class Explanation:
    """This class is the table that ``explain`` returns; ``print`` it, or read ``rows``."""

    rows: tuple[ExplanationRow, ...]
    microbatch_size: int

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Return the names of the parameters with a use that no rule covers."""
        return tuple(row.parameter for row in self.rows if "fallback" in row.by)

    def __str__(self) -> str:
        header = ("parameter", "shape", "uses", "by", "strategy", "memory", "reason")
        table = [header] + [
            (
                row.parameter,
                "x".join(map(str, row.shape)) or "scalar",
                str(row.uses),
                row.by,
                row.strategy,
                _size(row.memory),
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = _size(sum(row.memory for row in self.rows))
        lines.append(
            f"microbatch of {self.microbatch_size}: {total} beyond the ordinary step's activations"
        )
        return "\n".join(line.rstrip() for line in lines)


def make_explanation(
    entries: Sequence[Tracked], choices: Sequence[Choice], microbatch_size: int
) -> Explanation:
    """Turn tracked entries and their choices into a table, without expressions that the loss does not use."""
    rows = []
    for entry, choice in zip(entries, choices, strict=True):
        uses = len(entry.expected) + len(entry.fallback)
        if uses == 0 and entry.derived:
            continue
        counts = Counter(expected.rule for expected in entry.expected)
        counts.update(f"fallback: {operation}" for operation in entry.fallback)
        by = ", ".join(name if count == 1 else f"{name} x{count}" for name, count in counts.items())
        kept = choice.strategy.value == "kept"
        memory = choice.kept_bytes if kept else choice.factor_bytes
        rows.append(
            ExplanationRow(
                entry.name,
                tuple(entry.shared.shape),
                uses,
                by or "-",
                choice.strategy.value if uses else "-",
                choice.reason if uses else _unused(entry, entries),
                memory if uses else 0,
            )
        )
    return Explanation(tuple(rows), microbatch_size)


def _size(count: float) -> str:
    """Format a number of bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _unused(entry: Tracked, entries: Sequence[Tracked]) -> str:
    index = entry.parameters[0]
    if any(other.derived and index in other.parameters for other in entries):
        return "through the expressions below"
    return "not used by the loss"
