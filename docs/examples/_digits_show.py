"""What digits.py shows: progress, table, picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

console = Console(highlight=False)


@dataclass
class Outcome:
    """A training's curves. Epsilons are empty where there is no privacy."""

    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    epsilons: list[float] = field(default_factory=list)


def progress_bar() -> Progress:
    # In a log a bar is a nuisance; there, Watch prints lines.
    return Progress(
        TextColumn("{task.description:<11}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_interactive,
    )


class Watch:
    """Called after each step: moves the bar and, at the steps in ``epsilons``, evaluates the model.

    The loss shown is that of the test images. The loss of a batch would be computed from private
    data without noise; epsilon doesn't cover it, and logs get published.
    """

    def __init__(
        self,
        progress: Progress,
        name: str,
        model: nn.Module,
        test: TensorDataset,
        epsilons: Mapping[int, float | None],
    ):
        self.outcome = Outcome()
        self._progress, self._name, self._model = progress, name, model
        self._images, self._labels = test.tensors
        self._epsilons, self._steps = epsilons, max(epsilons)
        self._task = progress.add_task(name, total=self._steps, state="")
        self(0)

    def __call__(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        if step in self._epsilons:
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        with torch.no_grad():
            scores = self._model(self._images)
            loss = nn.functional.cross_entropy(scores, self._labels).item()
            accuracy = (scores.argmax(1) == self._labels).float().mean().item()
        state = f"loss {loss:.2f}  accuracy {accuracy:6.1%}"
        self.outcome.steps.append(step)
        self.outcome.accuracies.append(accuracy)
        epsilon = self._epsilons[step]
        if epsilon is not None:
            self.outcome.epsilons.append(epsilon)
            state += f"  epsilon {epsilon:.2f}"
        self._progress.update(self._task, state=state)
        if self._progress.disable:
            console.print(f"{self._name:<11} step {step:>4}/{self._steps}  {state}")


def table(outcomes: Mapping[str, Outcome], speeds: Mapping[str, float], *, baseline: str) -> None:
    shown = Table("training")
    for title in ("test accuracy", "epsilon", "samples/s", "relative speed"):
        shown.add_column(title, justify="right")
    for name, outcome in outcomes.items():
        shown.add_row(
            name,
            f"{outcome.accuracies[-1]:.1%}",
            f"{outcome.epsilons[-1]:.2f}" if outcome.epsilons else "none",
            f"{speeds[name]:,.0f}",
            f"{speeds[name] / speeds[baseline]:.0%}",
        )
    console.print(shown)


def plot(outcomes: Mapping[str, Outcome], path: Path, *, delta: float) -> None:
    # A Figure of its own, without pyplot, draws with Agg and never looks for a display.
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    plain, private = outcomes["not private"], outcomes["clipgrad"]
    last = private.epsilons[-1]
    above.set_title("Handwritten digits, with and without differential privacy")
    label = f"not private ({plain.accuracies[-1]:.1%} in the end)"
    above.plot(plain.steps, plain.accuracies, "--", color="tab:gray", label=label)
    label = f"private, clipgrad ({private.accuracies[-1]:.1%} in the end)"
    above.plot(private.steps, private.accuracies, color="tab:blue", label=label)
    above.set_ylabel("test accuracy")
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.set_ylim(0, 1.02)
    above.legend(loc="lower right")
    label = f"private, clipgrad ({last:.2f} in the end)"
    below.plot(private.steps, private.epsilons, color="tab:blue", label=label)
    below.set_ylabel(f"epsilon spent\n(at delta = {delta:g})")
    below.set_xlabel("training steps")
    below.set_xlim(0, private.steps[-1])
    below.set_ylim(bottom=0)
    below.legend(loc="lower right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
