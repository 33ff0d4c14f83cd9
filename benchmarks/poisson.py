"""Steps on Poisson batches, whose sizes change, beside steps on batches of the expected size.

Tables elsewhere are of batches of one size, and private training has others. A row here is the time of some 200 batches
of each kind, in blocks of ten: the blocks of all kinds take turns. Sizes are drawn once for all kinds. Compilation is
part of the first step, which is reported apart; every later step counts, with its comparisons with the eager step.
With one thread (``OMP_NUM_THREADS=1``) the time on a CPU is processor time, which other processes do not change.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measure import synchronize
from benchmarks.modes import Microbatch, Variant, adamw, standard
from benchmarks.peers.check import difference
from benchmarks.records import Cell, Ratio, Row, in_order, load, save
from benchmarks.step import NOISE_MULTIPLIER, SEED, Setting, Step
from benchmarks.workloads import WORKLOADS
from clipgrad import DPOptimizer

BATCHES, FEWEST_BATCHES, BLOCK = 200, 40, 10
DATASET = 50_000
"""Samples of the data set, each of which is in a batch with probability expected size / this."""
EXPECTED = (("cnn-small", 32), ("cnn-small", 64), ("cnn-small", 256), ("cnn-medium", 32))
"""Workloads and expected sizes of the rows."""


def sizes(expected: int, count: int) -> list[int]:
    """Sizes of Poisson batches, from a seed."""
    generator = torch.Generator().manual_seed(SEED)
    rate = torch.full((count,), expected / DATASET)
    drawn = torch.binomial(torch.full((count,), float(DATASET)), rate, generator=generator)
    return [int(size) for size in drawn]


class PrivateStep:
    """clipgrad's step on batches of changing or of one size.

    Args:
        setting: Workload, expected size and device.
        compile: As ``DPOptimizer`` knows it.
        drawn: Sizes of Poisson batches.
        poisson: Whether batches have these sizes; otherwise all have the expected size.
    """

    def __init__(
        self, setting: Setting, compile: bool | str, drawn: list[int], *, poisson: bool
    ) -> None:
        self._sizes = drawn if poisson else [setting.batch_size]
        largest = replace(setting, batch_size=max(*drawn, setting.batch_size))
        model, self._samples = largest.model_and_batch()
        self._expected, self._calls = setting.batch_size, 0
        self._optimizer = DPOptimizer(
            adamw(model, fused=True),
            model,
            setting.workload.loss,
            max_grad_norm=setting.max_grad_norm,
            noise_multiplier=NOISE_MULTIPLIER,
            expected_batch_size=setting.batch_size,
            microbatch_size=None if poisson else setting.batch_size,
            compile=compile,
        )

    def __call__(self) -> None:
        size = self._sizes[self._calls % len(self._sizes)]
        self._calls += 1
        self._optimizer.zero_grad()
        self._optimizer.backward(*(leaf[:size] for leaf in self._samples))
        self._optimizer.step()

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        self._optimizer.zero_grad()
        self._optimizer.backward(*(leaf[: self._expected] for leaf in self._samples))
        sums = self._optimizer.clipped_sums
        self._optimizer.zero_grad()
        return sums


@dataclass(frozen=True)
class Kind:
    """One column of the table: an ordinary step, or clipgrad's on batches of one size or of Poisson sizes."""

    key: str
    label: str
    compile: bool | str
    private: bool = True
    poisson: bool = False

    def make(self, setting: Setting, drawn: list[int]) -> Step:
        if self.private:
            return PrivateStep(setting, self.compile, drawn, poisson=self.poisson)
        variant = Variant(bool(self.compile), fused=True, graphs=isinstance(self.compile, str))
        return standard(setting, variant, Microbatch.BATCH, "inductor")


def kinds(device: str, *, quick: bool = False) -> list[Kind]:
    """All kinds of steps; ``quick`` leaves out what has to be compiled."""
    how: dict[str, bool | str] = {"eager": False}
    if not quick:
        how["compiled"] = True
        if device == "cuda":
            how["CUDA graphs"] = "reduce-overhead"
    found = []
    for name, compile in how.items():
        key = name.replace(" ", "-")
        found += [
            Kind(f"standard-{key}", f"standard ({name}, fused AdamW)", compile, private=False),
            Kind(f"fixed-{key}", f"clipgrad ({name}), fixed size", compile),
            Kind(f"poisson-{key}", f"clipgrad ({name}), Poisson", compile, poisson=True),
        ]
    return found


def measure(setting: Setting, seconds: float, *, quick: bool = False) -> Row:
    """One row: the same number of batches of each kind, in blocks that take turns.

    Args:
        setting: Workload, expected size and device.
        seconds: Time to spend; at least ``FEWEST_BATCHES`` are run, and at most ``BATCHES``.
        quick: Check gradients on two batches of each kind, and compile nothing.
    """
    began, chosen = time.perf_counter(), kinds(setting.device, quick=quick)
    drawn = sizes(setting.batch_size, BATCHES)
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    cells: dict[str, Cell] = {}
    expected: Mapping[str, Tensor] | None = None
    for kind in chosen:
        step = kind.make(setting, drawn)
        cell = Cell(
            kind.key, kind.label, "clipgrad" if kind.private else "standard",
            setting.batch_size, "batch", bool(kind.compile),
        )  # fmt: skip
        start = time.perf_counter()
        if isinstance(step, PrivateStep):
            found = step.clipped_gradient()
            expected = expected or found
            cell.check = difference(found, expected)
        step()
        synchronize(setting.device)
        cell.first_step_s = time.perf_counter() - start
        steps[kind.key], cells[kind.key] = step, cell
    once = sum(_seconds(step, setting.device, 1) for step in steps.values())
    batches = 2 if quick else min(BATCHES, max(FEWEST_BATCHES, int(seconds / once)))
    keys = list(steps)
    for block in range(max(1, batches // BLOCK)):
        gc.collect()
        for place in range(len(keys)):
            key = keys[(place + block) % len(keys)]
            taken = _seconds(steps[key], setting.device, min(BLOCK, batches))
            cells[key].seconds.append(taken)
    return Row(
        setting.workload.name, setting.workload.description, setting.batch_size, setting.device,
        list(cells.values()), environment(setting.device), time.perf_counter() - began,
    )  # fmt: skip


def _seconds(step: Callable[[], object], device: str, calls: int) -> float:
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(device)
    start = clock()
    for _ in range(calls):
        step()
    synchronize(device)
    return clock() - start


def total_speed(cell: Cell, than: Cell) -> Ratio:
    """How fast all batches of one kind ran beside another's, with the quartiles of the blocks."""
    blocks = [theirs / ours for ours, theirs in zip(cell.seconds, than.seconds, strict=True)]
    low, _, high = quantiles(blocks, n=4) if len(blocks) > 1 else (blocks[0],) * 3
    value = sum(than.seconds) / sum(cell.seconds)
    return Ratio(value, min(low, value), max(high, value))


def fastest(row: Row, prefix: str) -> Cell:
    """The fastest kind of step whose key begins so."""
    return min(
        (cell for cell in row.cells if cell.key.startswith(prefix)), key=lambda c: sum(c.seconds)
    )


def keep(folder: Path, device: str, row: Row) -> None:
    """Write a row; other rows stay as they are."""
    path = folder / "poisson" / f"{device}.json"
    save(path, in_order((load(path) | {row.key: row}).values(), list(WORKLOADS)))


def section(folder: Path, device: str) -> Iterable[str]:
    """The table of all stored rows."""
    rows = list(load(folder / "poisson" / f"{device}.json").values())
    if not rows:
        return
    yield "## Poisson batches"
    yield ""
    yield (
        "Batches as Poisson sampling draws them, everything but the first step included. Percent of the fastest "
        "ordinary step on batches of the expected size, with the quartiles of blocks of ten batches. The last column "
        "but one compares batches of changing size with batches of one size, of the same kind of step. Runs of one "
        "thread on a CPU count processor time."
    )
    yield ""
    yield "| Workload | Expected size | Batches | Step | Fixed size | **Poisson** | Poisson vs fixed | First step (s) |"
    yield "|---|---:|---:|---|---:|---:|---:|---:|"
    for row in rows:
        baseline = fastest(row, "standard-")
        for cell in row.cells:
            if not cell.key.startswith("poisson-"):
                continue
            how = cell.key.removeprefix("poisson-")
            fixed = fastest(row, f"fixed-{how}")
            first = f"{cell.first_step_s:.1f}" if cell.compiled and cell.first_step_s else "–"
            yield (
                f"| {row.workload} | {row.batch_size} | {BLOCK * len(cell.seconds)} | {how.replace('-', ' ')} | "
                f"{total_speed(fixed, baseline).percent} | {total_speed(cell, baseline).percent} | "
                f"{total_speed(cell, fixed).percent} | {first} |"
            )
    yield ""


def lines(row: Row) -> Iterable[str]:
    """A short form for the terminal."""
    baseline = fastest(row, "standard-")
    for cell in row.cells:
        speed = total_speed(cell, baseline).percent
        yield f"  {cell.label:<36} {1e3 * sum(cell.seconds) / BLOCK / len(cell.seconds):8.2f} ms a batch  {speed}"
