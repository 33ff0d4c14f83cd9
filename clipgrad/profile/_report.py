"""What a profile says, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipgrad._phases import PHASES


@dataclass(frozen=True)
class StepProfile:
    """What ``profile_step`` returns: medians over its rounds, in seconds. **Not private**; ``print`` it for a table.

    Phases exclude each other, so those of one step add up to it. They come from steps that were stopped at every
    boundary, ``clipped`` and ``standard`` from steps that ran as in training.

    Attributes:
        phases: Of the clipped step: ``forward`` (leaves, loss under ``vmap``, plan), ``backward`` (the backward pass
            but for what clipgrad's hooks do in it), ``per-sample gradients`` (what they do), ``norms`` (and factors),
            ``contraction`` (clipped sums), ``bookkeeping`` (checks, the copy that ``.grad`` shows, everything else),
            ``noise``, ``optimizer`` (the wrapped one's ``step`` and ``zero_grad``).
        standard_phases: Of the standard step: ``forward``, ``backward``, ``optimizer``.
        clipped: The clipped step: ``backward``, ``step``, ``zero_grad``.
        standard: ``loss_fn(model, *batch).backward()``, then ``step`` and ``zero_grad`` of the wrapped optimizer.
        batch_size: Samples of the batch.
        microbatch_size: Samples of a forward pass; None for the whole batch.
        device: Where the parameters are, such as ``"cuda:0"``.
        threads: What ``torch.get_num_threads()`` says.
        rounds: Steps of each kind that were measured.
    """

    phases: Mapping[str, float]
    standard_phases: Mapping[str, float]
    clipped: float
    standard: float
    batch_size: int
    microbatch_size: int | None
    device: str
    threads: int
    rounds: int

    @property
    def ratio(self) -> float:
        """The clipped step's time in units of the standard step's."""
        return self.clipped / self.standard

    def as_dict(self) -> dict[str, Any]:
        """All attributes and the ratio, in dictionaries, strings and numbers only."""
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
        return "\n".join([*_aligned(table), *self._notes()])

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
            "in one piece"
            if self.microbatch_size is None
            else f"in microbatches of {self.microbatch_size}"
        )
        measured = f"milliseconds, medians of {self.rounds} interleaved steps of each kind"
        setting = f"batch of {self.batch_size} {pieces}, {self.device}, {self.threads} threads"
        verdict = f"the clipped step takes {self.ratio:.2f} times as long as the standard one"
        notes = [f"{measured}; {setting}", f"{verdict}: {100 / self.ratio:.0f} % of its speed"]
        if self.device != "cpu":
            notes.append(
                f"phases come from steps in which {self.device} was waited for at every boundary, which the whole "
                "step is spared: they add up to more"
            )
        return notes


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right, a rule under the head and one above the sums."""
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
