"""Interleaving, failing modes, peak memory: with steps whose times and sizes are known."""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import memory, row
from benchmarks.measure import FEWEST_ROUNDS, SLOW, SLOW_ROUNDS, interleaved, timed
from benchmarks.modes import Kind, Microbatch, Mode
from benchmarks.step import Setting, Step, Unavailable
from benchmarks.workloads._workload import Workload
from benchmarks.workloads.cnn import classification, cnn, images

TINY = Workload("tiny", "", lambda: cnn(8, (4,), 8), lambda n: images(8, n), classification, {})


def test_each_round_runs_every_step_once_and_starts_with_another() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(steps, "cpu", seconds=0.0, most_rounds=30)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(
        "abc", FEWEST_ROUNDS
    )
    timed_part = order[3:]
    rounds = [timed_part[i : i + 3] for i in range(0, len(timed_part), 3)]
    assert all(Counter(found) == Counter("abc") for found in rounds)
    assert [found[0] for found in rounds] == ["a", "b", "c", "a", "b"]


@pytest.mark.nightly
def test_time_decides_the_rounds_within_bounds() -> None:
    steps = {"a": lambda: None}
    assert len(interleaved(steps, "cpu", seconds=60.0, most_rounds=7)["a"]) == 7


@pytest.mark.nightly
def test_a_slow_step_does_not_eat_the_rounds_of_the_others() -> None:
    class Taking:
        def __init__(self, seconds: float) -> None:
            self.seconds = lambda: seconds

        def __call__(self) -> None: ...

    steps = {"quick": Taking(1.0), "slow": Taking(1.5 * SLOW)}
    found = interleaved(steps, "cpu", seconds=SLOW_ROUNDS * (1 + 1.5 * SLOW) + 4, most_rounds=30)
    assert {name: len(times) for name, times in found.items()} == {"quick": 7, "slow": 3}
    found = interleaved(steps, "cpu", seconds=0.0, most_rounds=30)
    assert {name: len(times) for name, times in found.items()} == {"quick": 5, "slow": 3}


def test_a_step_in_another_process_times_itself() -> None:
    class Elsewhere:
        def __call__(self) -> None: ...

        def seconds(self) -> float:
            return 42.0

    assert timed(Elsewhere(), "cpu") == 42.0
    assert timed(lambda: None, "cpu") < 1.0


def mode(make: object, key: str = "m", kind: Kind = Kind.STANDARD) -> Mode:
    return Mode(key, key, kind, Microbatch.BATCH, compiled=False, make=make)  # type: ignore[arg-type]


def failing_later() -> Step:
    calls: list[None] = []

    def step() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError("full\nmore")

    return step


def raising(error: Exception) -> object:
    def make(setting: Setting) -> Step:
        raise error

    return make


@pytest.mark.nightly
def test_a_failing_mode_keeps_its_line_and_ends_nothing() -> None:
    modes = [
        mode(lambda setting: lambda: None, "good"),
        mode(raising(Unavailable("x is not installed: pip install x")), "absent"),
        mode(raising(TypeError("first line\nsecond")), "broken"),
        mode(lambda setting: failing_later(), "later"),
    ]
    plan = row.Plan(seconds=0.0, most_rounds=5, memory=False)
    found = row.measure_row(Setting(TINY, 4), modes, plan)
    reasons = {cell.key: cell.reason for cell in found.cells}
    assert reasons == {
        "good": None,
        "absent": "x is not installed: pip install x",
        "broken": "error: TypeError: first line",
        "later": "error: MemoryError: full",
    }
    assert [cell.key for cell in found.measured] == ["good"]


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_of_a_known_size() -> None:
    """64 MiB held and 32 MiB more within the step; in a fresh process, as the suite measures it."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        assert process.apply(known_size) / 2**20 == pytest.approx(96, abs=4)


def known_size() -> int:
    memory.modes = lambda device: {"m": mode(holding)}
    memory.WORKLOADS["tiny"] = TINY
    return memory._measure("tiny", 4, "m")


def holding(setting: Setting) -> Step:
    held = torch.ones(16 * 2**20)
    sparse = torch.eye(2).to_sparse()  # has no storage to ask

    def step() -> None:
        assert sparse.is_sparse
        torch.ones(8 * 2**20).add_(held[0])

    return step


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_the_memory_server_answers_and_says_why_it_cannot() -> None:
    with memory.MemoryServer() as server:
        peak = server.peak("cnn-small", 4, "standard-eager-fused-mb-all")
        assert 10 * 2**20 < peak < 200 * 2**20  # 1.07 M parameters four times over, and a little
        with pytest.raises(RuntimeError, match="KeyError"):
            server.peak("cnn-small", 4, "no such mode")
        assert server.peak("cnn-small", 4, "standard-eager-fused-mb-all") > 0
