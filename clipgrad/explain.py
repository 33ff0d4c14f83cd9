"""Explain the cost of a loss: one row per parameter, and what several processes cost, from a forward pass alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clipgrad.engine.norm_method import Choice, has_choice
from clipgrad.engine.tracked import Tracked
from clipgrad.ranks import Cost


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
        kept_memory: The same if its per-sample gradients are kept.
        ghost_memory: The same if its norms are ghost norms, where these exist; else as kept.
    """

    parameter: str
    shape: tuple[int, ...]
    uses: int
    by: str
    strategy: str
    reason: str
    memory: int
    kept_memory: int
    ghost_memory: int


@dataclass(frozen=True)
class Explanation:
    """This class is the table that ``explain`` returns; ``print`` it, or read ``rows``.

    Attributes:
        rows: One for each parameter or expression of parameters.
        microbatch_size: The number of samples that the memory is estimated for.
        processes: How many processes train together.
        costs: What that costs each of them, beside the rows.
    """

    rows: tuple[ExplanationRow, ...]
    microbatch_size: int
    processes: int = 1
    costs: tuple[Cost, ...] = ()

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
        kept, ghost, chosen = (
            _size(sum(getattr(row, name) for row in self.rows))
            for name in ("kept_memory", "ghost_memory", "memory")
        )
        lines.append(
            f"microbatch of {self.microbatch_size}: all kept takes {kept}, ghost norms {ghost}, and the choice above "
            f"{chosen} beyond the ordinary step's activations"
        )
        if self.costs:
            lines.append(f"each of {self.processes} processes, besides:")
            sizes = [_size(cost.size) for cost in self.costs]
            width = max(map(len, sizes))
            lines += [
                f"  {cost.kind}  {size.rjust(width)}  {cost.what}"
                for cost, size in zip(self.costs, sizes, strict=True)
            ]
        return "\n".join(line.rstrip() for line in lines)


def make_explanation(
    entries: Sequence[Tracked],
    choices: Sequence[Choice],
    microbatch_size: int,
    processes: int = 1,
    costs: tuple[Cost, ...] = (),
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
        kept = choice.kept_bytes if uses else 0
        ghost = choice.factor_bytes if uses and has_choice(entry) else kept
        rows.append(
            ExplanationRow(
                entry.name,
                tuple(entry.shared.shape),
                uses,
                by or "-",
                choice.strategy.value if uses else "-",
                choice.reason if uses else _unused(entry, entries),
                kept if choice.strategy.value == "kept" else ghost,
                kept,
                ghost,
            )
        )
    return Explanation(tuple(rows), microbatch_size, processes, costs)


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
