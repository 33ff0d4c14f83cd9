"""Peak memory of a mode: the CUDA allocator's, or a fresh process's high-water mark."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.allocator import environment_of_mappings
from benchmarks.modes import modes
from benchmarks.step import Setting, Step, close
from benchmarks.workloads import WORKLOADS

WARM_UP = 2
STEPS = 3
SLOW_S = 1.0
"""A step that takes longer shows its peak at once."""


def cuda_peak(step: Step, before: int) -> int:
    """Bytes that the mode's steps hold at their peak: weights, optimizer state and batch included.

    Args:
        step: Warm, and without CUDA graphs, which all of a process share one pool of memory.
        before: Bytes that were allocated before the step was made.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return _own(step) or torch.cuda.max_memory_allocated() - before


class MemoryServer:
    """Measures modes on the CPU, each in a fresh process.

    Starting Python and importing everything takes seconds; a server that has imported but never computed forks a
    child for each question instead, and the child is as fresh.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment_of_mappings(),
        )

    def __enter__(self) -> MemoryServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def peak(self, workload: str, batch_size: int, mode: str, *, limit_s: float = 600) -> int:
        """Peak bytes of the steps of one mode.

        Raises:
            RuntimeError: If the child failed or took longer than ``limit_s``; says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = {"workload": workload, "batch_size": batch_size, "mode": mode, "limit": limit_s}
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"error": "the server died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return int(answer["peak"])


def _own(step: Step) -> int | None:
    """A step that runs in another process knows that process's memory."""
    peak: Callable[[], int] | None = getattr(step, "peak_bytes", None)
    return None if peak is None else peak()


def _status(field: str) -> int:
    """A field of this process's status in bytes; ``getrusage`` would start from the parent's peak."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def _live_tensors() -> int:
    """Bytes of the storages of all tensors that Python knows; a compiler's fake tensors have none."""
    storages = {}
    for thing in gc.get_objects():
        plain = type(thing) in (torch.Tensor, torch.nn.Parameter)
        if plain and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _settle() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _measure(workload: str, batch_size: int, mode: str) -> int:
    """High-water mark of warm steps above a process without their tensors.

    What importing and compiling leave behind (code, caches) is no tensor and is not counted.
    """
    step = modes("cpu")[mode].make(Setting(WORKLOADS[workload], batch_size))
    for _ in range(WARM_UP):
        began = time.perf_counter()
        step()
    steps = STEPS if time.perf_counter() - began < SLOW_S else 1
    own = _own(step)
    if own is not None:
        close(step)
        return own
    _settle()
    base = _status("VmRSS") - _live_tensors()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(steps):
        step()
    return _status("VmHWM") - base


def _child(question: dict[str, Any], write: int) -> None:
    timer = threading.Timer(question["limit"], lambda: os._exit(124))
    timer.daemon = True
    timer.start()
    try:
        peak = _measure(question["workload"], question["batch_size"], question["mode"])
        answer: dict[str, Any] = {"peak": peak}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    os.write(write, json.dumps(answer).encode())
    os._exit(0)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(json.loads(line), write)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        reason = "took too long" if code == 124 else f"ended with {code}"
        print(answer or json.dumps({"error": reason}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
