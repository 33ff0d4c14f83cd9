"""A progress bar with an estimate of the time left, while pytest captures everything else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

UNKNOWN_ROW_S = 150.0


class Bar:
    """Progress over rows, each as long as it took the last time it was measured.

    On a terminal a bar; elsewhere a line when a row begins.

    Args:
        rows: Keys of the rows to come.
        before: Seconds that rows took in an earlier run, as far as known.
    """

    def __init__(self, rows: list[str], before: Mapping[str, float]) -> None:
        self._expected = {row: before.get(row) or UNKNOWN_ROW_S for row in rows}
        self._total = sum(self._expected.values())
        self._spent = 0.0
        self._start = time.perf_counter()
        # Not sys.stderr, which pytest has replaced.
        self._console = Console(file=sys.__stderr__)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, left="")
        self._row = ""
        if self._live:
            self._progress.start()

    def begin(self, row: str) -> None:
        self._row = row
        if not self._live:
            done = len([r for r in self._expected if r])  # rows still to come
            print(
                f"{row}: {done} rows to go, {self._left(self._spent)}",
                file=sys.__stderr__,
                flush=True,
            )

    def note(self, what: str, share: float) -> None:
        done = self._spent + share * self._expected.get(self._row, 0.0)
        if self._live:
            self._progress.update(
                self._task,
                completed=done / self._total,
                description=f"{self._row}: {what}",
                left=self._left(done),
            )

    def end(self, row: str) -> None:
        self._spent += self._expected.pop(row, 0.0)

    def stop(self) -> None:
        if self._live:
            self._progress.stop()

    def _left(self, done: float) -> str:
        """The rows still to come, at the pace so far: this machine may be another than the last one."""
        elapsed = time.perf_counter() - self._start
        pace = elapsed / done if done > 30 else 1.0
        minutes = (self._total - done) * pace / 60
        return f"about {max(1, round(minutes))} min left"
