"""This file holds ``StepProfile``, the result of a measurement, and prints it as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipgrad._phases import PHASES


@dataclass(frozen=True)
class StepProfile:
    """This class holds the medians over the rounds of ``profile_step``, in seconds. ``print`` it for a table.

    The times are **not private**. Phases exclude each other, so the phases of one step add up to its time. They come
    from steps that wait for the device at every boundary; ``clipped`` and ``standard`` come from steps as in training.

    Attributes:
        phases: Phases of the clipped step: ``forward`` (leaves, loss under ``vmap``, choice of strategies),
            ``backward`` (the backward pass without clipgrad's hooks), ``per-sample gradients`` (clipgrad's hooks),
            ``norms`` (with factors), ``contraction`` (clipped sums), ``bookkeeping`` (checks and everything else),
            ``noise``, ``optimizer`` (``step`` and ``zero_grad`` of the wrapped optimizer).
        standard_phases: Phases of the standard step: ``forward``, ``backward``, ``optimizer``.
        clipped: Time of the clipped step: ``backward``, ``step``, ``zero_grad``.
        standard: Time of ``loss_fn(model, *batch).backward()`` and the wrapped optimizer's ``step`` and ``zero_grad``.
        batch_size: Number of samples in the batch.
        microbatch_size: Number of samples in a forward pass; None for the whole batch.
        device: The device of the parameters, such as ``"cuda:0"``.
        threads: The value of ``torch.get_num_threads()``.
        rounds: Number of measured steps of each kind.
    """

    phases: Mapping[str, float]
    standard_phases: Mapping[str, float]
    clipped: float
    standard: float
    batch_size: int
    microbatch_size: int | str | None
    device: str
    threads: int
    rounds: int

    @property
    def ratio(self) -> float:
        """Return the clipped step's time divided by the standard step's time."""
        return self.clipped / self.standard

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes and the ratio as dictionaries, strings and numbers."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        phases = sum(self.phases.values())
        standard_phases = sum(self.standard_phases.values())
        table = [
            ("phase", "clipped", "share", "standard", "extra"),
            *(self._row(name, phases) for name in PHASES),
            ("all phases", _ms(phases), "100 %", _ms(standard_phases), _ms(phases - standard_phases)),
            ("whole step", _ms(self.clipped), "", _ms(self.standard), _ms(self.clipped - self.standard)),
        ]  # fmt: skip
        return "\n".join([*_align_columns(table), *self._notes()])

    def _row(self, name: str, total: float) -> tuple[str, ...]:
        clipped, standard = self.phases.get(name, 0.0), self.standard_phases.get(name)
        return (
            name,
            _ms(clipped),
            f"{100 * clipped / total:.0f} %",
            "-" if standard is None else _ms(standard),
            _ms(clipped - (standard or 0.0)),
        )

    def _notes(self) -> list[str]:
        pieces = (
            "without microbatches"
            if self.microbatch_size is None
            else f"in microbatches of {self.microbatch_size}"
        )
        measured = f"milliseconds, medians of {self.rounds} interleaved steps of each kind"
        setting = f"batch of {self.batch_size} {pieces}, {self.device}, {self.threads} threads"
        verdict = f"the clipped step takes {self.ratio:.2f} times as long as the standard one"
        notes = [f"{measured}; {setting}", f"{verdict}: {100 / self.ratio:.0f} % of its speed"]
        if self.device != "cpu":
            notes.append(
                f"phases come from steps that wait for {self.device} at every boundary, which the whole step does not: "
                "they add up to more"
            )
        return notes


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _align_columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column left and numbers right, with a rule below the head and another above the sums."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    rule = "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
