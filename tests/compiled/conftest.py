"""Compiled steps without the wait: graphs are traced and lifted as ever, then run as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from clipgrad.compiled import backend
from clipgrad.compiled import compiler as compiler_module
from clipgrad.engine.reference import Params, clipped_sum, per_sample_gradients_by_loop
from clipgrad.result import ClippedGradResult


@dataclass
class Graphs:
    """The graphs that were handed to the backend.

    Attributes:
        modules: In the order of their making.
        alter: What to run instead of a graph.
    """

    modules: list[GraphModule] = field(default_factory=list)
    alter: Callable[[GraphModule], Callable[..., Any]] = lambda module: module

    def __len__(self) -> int:
        return len(self.modules)


NONSENSE = 77


class Recorder:
    """Counts what is asked of it; each replay has to wait for the one before."""

    made: list[Recorder]

    def __init__(self, pool: object) -> None:
        self.replays, self.waited = 0, False
        type(self).made.append(self)

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        assert self.waited, "a trial run would overwrite what another recording still reads"
        self._function = function
        self._results = [result.clone().fill_(NONSENSE) for result in function()]
        return self._results

    def wait(self) -> None:
        self.waited = True

    def replay(self) -> None:
        assert self.waited, "another recording may be at work in the same memory"
        self.waited = False
        self.replays += 1
        for kept, result in zip(self._results, self._function(), strict=True):
            kept.copy_(result)


def record_by_stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Record compiled steps on the CPU, by recorders that come into the list."""
    Recorder.made = []
    monkeypatch.setattr(backend, "uses_cuda_graphs", lambda mode, device: True)
    monkeypatch.setattr(compiler_module, "recordable", lambda module, device: True)
    monkeypatch.setattr(compiler_module, "CudaRecorder", Recorder)
    return Recorder.made


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    return record_by_stand_in(monkeypatch)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Run graphs operation by operation instead of compiling them."""
    found = Graphs()

    def compile_graph(module: GraphModule, mode: str, arguments: Any) -> Callable[..., Any]:
        found.modules.append(module)
        return found.alter(module)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    return found


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def norms_of_equal_sums(
    found: ClippedGradResult,
    loss: Callable[..., Tensor],
    norm: float,
    params: Params,
    *batch: Tensor,
) -> Tensor:
    """Compare clipped sums in float64 with those of a loop over the samples, and return its norms."""
    per_sample = per_sample_gradients_by_loop(loss, params, *batch)[1]
    expected, norms = clipped_sum(per_sample, norm)
    for key, total in expected.items():
        torch.testing.assert_close(found.grads[key], total, rtol=1e-12, atol=1e-12)
    return norms
