"""Marks around phases: whose time is whose, and what an exception leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from clipgrad import _phases, profile_step
from clipgrad._phases import listening, phase
from clipgrad.profile._measure import Stopwatch
from tests.clocked import Clock
from tests.dp_tools import data, mlp, private

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nobody_is_left_listening() -> Iterator[None]:
    yield
    assert _phases._listener is None


def test_nested_phases_exclude_each_other() -> None:
    clock = Clock()

    def step() -> None:
        clock.work(1)
        with phase("backward"):
            clock.work(2)
            for _ in range(2):
                with phase("per-sample gradients"):
                    clock.work(4)
                clock.work(8)
            with phase("backward"):
                clock.work(100)
        clock.work(32)

    seconds = Stopwatch(clock, CPU).by_phase(step)
    assert seconds == {"bookkeeping": 33, "backward": 118, "per-sample gradients": 8}


def test_an_exception_ends_its_phases() -> None:
    clock = Clock()
    watch = Stopwatch(clock, CPU)

    def fails() -> None:
        with phase("forward"), phase("norms"):
            clock.work(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch.by_phase(fails)
    assert watch.by_phase(lambda: clock.work(5)) == {"bookkeeping": 5}


def test_who_was_told_of_the_beginning_is_told_of_the_end() -> None:
    watch = Stopwatch(Clock(), CPU)
    late = phase("norms")
    with listening(watch), late:
        assert watch._open == []
    mark = phase("norms")
    assert mark._listener is None


def test_one_profile_at_a_time() -> None:
    watch = Stopwatch(Clock(), CPU)
    with listening(watch):
        with pytest.raises(RuntimeError, match="profiled already"):
            profile_step(private(mlp()), data())
        assert _phases._listener is watch


def test_the_device_is_waited_for_at_every_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    device = torch.device("cuda", 0)
    watch = Stopwatch(Clock(), device)

    def step() -> None:
        with phase("forward"):
            pass

    watch.by_phase(step)
    assert waits == [device] * 4
    waits.clear()
    watch.whole(lambda: None)
    assert waits == [device] * 2
