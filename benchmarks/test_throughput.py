"""The tables: every mode of every workload, each a benchmark of its own, timed together row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.conftest import Session
from benchmarks.modes import Kind, Mode
from benchmarks.peers.check import Check, checking
from benchmarks.records import Cell, speed
from benchmarks.row import check_mode, close_all, reason_of


class Replay:
    """A clock that advances by the times that were measured.

    The modes of a row are timed together, round by round, which one benchmark fixture cannot do. Each mode's fixture
    gets its own times from this clock, so that the tables, files and comparisons of pytest-benchmark hold them.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.coming: list[float] = []

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: list[float]) -> None:
        self.coming = list(seconds)

    def step(self) -> None:
        self.now += self.coming.pop(0)


CLOCK = Replay()


# What a library warns of is no failure of its own, and a row ignores it as well.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
def test_throughput(
    benchmark: Any, run: Session, workload: str, batch_size: int, mode: Mode
) -> None:
    if run.quick:
        benchmark.pedantic(_check_once, (run, workload, mode))
        return
    row = run.row(workload, batch_size)
    cell = next(cell for cell in row.cells if cell.key == mode.key)
    if not cell.seconds:
        benchmark.skipped = True  # else the fixture warns that nobody used it
        _no_time(mode, cell)
    benchmark.group = f"{workload}, batch {batch_size}, {row.device}"
    ratio = speed(cell, row.baseline())
    benchmark.extra_info |= {
        "samples_per_s": row.throughput(cell),
        "of_standard": ratio.value,
        "of_standard_spread": (ratio.low, ratio.high),
        "peak_bytes": cell.peak_bytes,
        "first_step_s": cell.first_step_s,
    }
    CLOCK.load(cell.seconds)
    benchmark.pedantic(CLOCK.step, rounds=len(cell.seconds))
    if mode.kind is Kind.CLIPGRAD:
        assert cell.check is None, f"clipgrad's gradient is not the oracle's: {cell.check}"


def _no_time(mode: Mode, cell: Cell) -> None:
    """A peer that cannot run is a result; clipgrad or the ordinary step that cannot run is a failure."""
    reason = f"{mode.label}: {cell.reason}"
    if mode.kind is Kind.PEER:
        pytest.skip(reason)
    pytest.fail(reason)


def _check_once(run: Session, workload: str, mode: Mode) -> None:
    """Two steps of a small batch, and the gradient beside the oracle's."""
    setting = run.setting(workload, 4)
    try:
        said = check_mode(mode, Check(checking(setting))) if mode.private else None
        step = mode.make(setting)
        step()
        step()
        close_all({mode.key: step})
    except Exception as error:
        if mode.kind is Kind.PEER:
            pytest.skip(f"{mode.label}: {reason_of(error)}")
        raise
    if mode.kind is Kind.CLIPGRAD:
        assert said is None, said
    elif said is not None:
        pytest.skip(f"{mode.label}: {said}")


def test_standard_step_learns(run: Session) -> None:
    """What everything is compared with has to be real training."""
    setting = run.setting("cnn-small", 8)
    model, batch = setting.model_and_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = setting.workload.loss(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0]
