"""Measuring one row: check every private mode against the oracle, warm up, interleave, ask for memory."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measure import interleaved, synchronize, timed
from benchmarks.memory import MemoryServer, cuda_peak
from benchmarks.modes import ClippedStep, Kind, Microbatch, Mode
from benchmarks.peers import check
from benchmarks.records import Cell, Row
from benchmarks.step import Setting, Step, Unavailable, close

HOPELESS_S = 20.0
"""What a step would take if a check of few samples, with all that a first run takes, were any guide."""

NotePoint = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        seconds: Time for the interleaved rounds of a row.
        most_rounds: No more rounds than this.
        memory: Whether peaks are measured.
        slowest: Seconds. A peer whose step takes longer is told of and left out: it would take longer than all others
            of the row together.
    """

    seconds: float = 60.0
    most_rounds: int = 30
    memory: bool = True
    slowest: float = 5.0


def measure_row(
    setting: Setting,
    modes: Iterable[Mode],
    plan: Plan,
    note: NotePoint = lambda what, share: None,
    *,
    sweep: bool = False,
) -> Row:
    """Measure all modes of a row together.

    A mode that fails keeps its line, with the reason; it does not end the row.

    Args:
        setting: Workload, batch size, device.
        modes: What to measure.
        plan: How much.
        note: Told what is being done and the share of the row that is done.
        sweep: The row is a point of a chart.
    """
    began = time.perf_counter()
    torch._dynamo.reset()  # it counts how often a piece of code was compiled, over all rows
    modes = list(modes)
    cells = {mode.key: _cell(mode, setting) for mode in modes}
    steps: dict[str, Step] = {}
    wanted = _Wanted(setting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library warns of is no failure of the measurement
        if setting.device == "cuda":  # workspaces of libraries belong to no mode
            ClippedStep(setting, Microbatch.BATCH, False)()
        for index, mode in enumerate(modes):
            note(f"preparing {mode.label}", 0.35 * index / len(modes))
            step = _prepare(mode, setting, cells[mode.key], wanted, plan)
            if step is not None:
                steps[mode.key] = step
        labels = {mode.key: f"{mode.label}, microbatch {mode.microbatch.value}" for mode in modes}
        times = _times(steps, setting.device, plan, labels, note)
        for key, seconds in times.items():
            cells[key].seconds = seconds
        close_all(steps)
        if plan.memory and setting.device == "cpu":
            _memory(setting, modes, cells, note)
    return Row(
        workload=setting.workload.name,
        description=setting.workload.description,
        batch_size=setting.batch_size,
        device=setting.device,
        cells=list(cells.values()),
        environment=environment(setting.device),
        wall_s=time.perf_counter() - began,
        sweep=sweep,
    )


def _cell(mode: Mode, setting: Setting) -> Cell:
    return Cell(
        key=mode.key,
        label=mode.label,
        kind=mode.kind.value,
        microbatch=mode.microbatch.of(setting.batch_size),
        share=mode.microbatch.value,
        compiled=mode.compiled,
    )


class _Wanted:
    """What a row's private modes have to compute, each found when it is first asked for and kept."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._gradient: dict[str, Tensor] | None = None

    @cached_property
    def oracle(self) -> check.Check:
        return check.Check(check.checking(self._setting))

    def difference_to_eager(self, step: Step) -> str | None:
        """How a step's gradient at the row's own setting differs from that of clipgrad's eager step."""
        if self._gradient is None:
            found = ClippedStep(self._setting, Microbatch.BATCH, False).clipped_gradient()
            self._gradient = {name: gradient.detach().clone() for name, gradient in found.items()}
        return check.difference(step.clipped_gradient(), self._gradient)  # type: ignore[attr-defined]


def _prepare(mode: Mode, setting: Setting, cell: Cell, wanted: _Wanted, plan: Plan) -> Step | None:
    """Build the mode's step, run it once, which compiles it, and check its gradient.

    clipgrad's compiled steps are compared with its eager step, which is compared with the oracle: another batch size
    would have to be compiled anew.
    """
    compiled = mode.kind is Kind.CLIPGRAD and mode.compiled
    try:
        if mode.private and not compiled:
            began = time.perf_counter()
            cell.check = check_mode(mode, wanted.oracle)
            _refuse_hopeless(mode, setting, wanted.oracle.setting, time.perf_counter() - began)
            _forget(setting.device)
        before = torch.cuda.memory_allocated() if setting.device == "cuda" else 0
        step = mode.make(setting)
        if compiled:
            synchronize(setting.device)
            began = time.perf_counter()
            cell.check = wanted.difference_to_eager(step)
            synchronize(setting.device)
            cell.first_step_s = time.perf_counter() - began
        else:
            cell.first_step_s = timed(step, setting.device)
        # A second step may fail where the first did not (memory fills up): better now than amid the rounds.
        taken = cell.first_step_s
        if (
            mode.compiled or taken < 2 * plan.slowest
        ):  # a first step is not twice as slow unless it compiles
            taken = timed(step, setting.device)
        if taken > plan.slowest and mode.kind is Kind.PEER:
            close_all({mode.key: step})
            raise Unavailable(f"one step took {taken:.1f} s; not timed any further")
        if plan.memory and setting.device == "cuda":
            if mode.graphs:
                cell.memory_reason = (
                    "not measured: the CUDA graphs of a process share one memory pool"
                )
            else:
                cell.peak_bytes = cuda_peak(step, before)
    except Exception as error:
        cell.reason = reason_of(error)
        return None
    finally:
        _forget(setting.device)
    return step


def _refuse_hopeless(mode: Mode, setting: Setting, checked: Setting, taken: float) -> None:
    """Leave a peer out whose gradient of a few samples took so long that its step would take far too long."""
    whole = taken * setting.batch_size / checked.batch_size
    if mode.kind is Kind.PEER and not mode.compiled and whole > HOPELESS_S:
        raise Unavailable(
            f"a gradient of {checked.batch_size} samples took {taken:.1f} s; not timed any further"
        )


def check_mode(mode: Mode, oracle: check.Check) -> str | None:
    """None if the mode's clipped gradient is the oracle's; else how it differs."""
    step = mode.make(oracle.setting)
    try:
        return oracle.compare(step)  # type: ignore[arg-type]
    finally:
        close_all({mode.key: step})


def _times(
    steps: dict[str, Step],
    device: str,
    plan: Plan,
    labels: dict[str, str],
    note: NotePoint,
) -> dict[str, list[float]]:
    def on_step(name: str, done: int, steps_in_all: int) -> None:
        note(f"timing {labels[name]}", 0.35 + 0.45 * done / steps_in_all)

    if not steps:
        return {}
    return interleaved(
        steps, device, seconds=plan.seconds, most_rounds=plan.most_rounds, on_step=on_step
    )


def _memory(setting: Setting, modes: list[Mode], cells: dict[str, Cell], note: NotePoint) -> None:
    """Peaks on the CPU; on a GPU they were asked for while the steps were prepared."""
    todo = [mode for mode in modes if cells[mode.key].seconds]
    # Nothing is timed here, so two processes may get in each other's way.
    with MemoryServer() as one, MemoryServer() as other, ThreadPoolExecutor(2) as threads:
        idle = SimpleQueue[MemoryServer]()
        idle.put(one)
        idle.put(other)

        def ask(mode: Mode) -> None:
            server = idle.get()
            try:
                peak = server.peak(setting.workload.name, setting.batch_size, mode.key)
                cells[mode.key].peak_bytes = peak
            except Exception as error:
                cells[mode.key].memory_reason = reason_of(error)
            finally:
                idle.put(server)

        asked = [threads.submit(ask, mode) for mode in todo]
        for index, (mode, answer) in enumerate(zip(todo, asked, strict=True)):
            note(f"memory of {mode.label}", 0.8 + 0.2 * index / len(todo))
            answer.result()


def reason_of(error: Exception) -> str:
    """One line for a cell."""
    if isinstance(error, Unavailable):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"error: {type(error).__name__}: {text[:160]}"


def close_all(steps: dict[str, Step]) -> None:
    """End the processes that steps have started, and let go of the steps."""
    for step in steps.values():
        close(step)
    steps.clear()
    gc.collect()


def _forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
