"""``Compiler``: it finds the graph that serves a microbatch, makes it where there is none, and runs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipgrad.compiled import backend
from clipgrad.compiled.cuda_graphs import CudaRecorder, Replay, recordable
from clipgrad.compiled.signature import difference
from clipgrad.compiled.trace import TracedStep, trace
from clipgrad.engine.captured_loss import GraphOfLoss
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.errors import CompileError

LIMIT = 8
_log = logging.getLogger("clipgrad")


@dataclass
class CompiledStep:
    """One compiled graph and what it was made for.

    Attributes:
        signature: What has to be equal for the graph to serve.
        graph: The traced step.
        run: The compiled step.
        replay: The same as a recorded CUDA graph, where there is one.
        runs: How many microbatches have run on it.
        tensors: What the loss read besides its arguments when it ran last.
    """

    signature: tuple[Any, ...]
    graph: TracedStep
    run: backend.Run
    replay: Replay | None = None
    runs: int = 0
    tensors: Sequence[Tensor] = ()

    def arguments(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What the graph reads: the call's tensors, and those that the trace made of Python numbers."""
        flat = [*given, *self.graph.constants]
        return flat if self.replay is not None else [tensor.detach() for tensor in flat]

    def is_trusted(self, flat: Sequence[Tensor]) -> bool:
        """Whether the next run needs no comparison with the eager step.

        Runs 1, 2, 4, 8, ... are compared: what PyTorch's guards do not notice cannot stay unnoticed for long.
        """
        next_run = self.runs + 1
        compared = next_run & self.runs == 0
        return not compared and (self.replay is None or self.replay.is_recorded_for(flat))

    def start(self, given: Sequence[Tensor]) -> bool:
        """Replay the step before anybody has checked whether the graph serves, if that can be undone.

        A replay writes to the recording's own memory only. If the graph turns out not to serve, nothing reads it.

        Returns:
            Whether a replay was started, so that ``call`` has only to fetch the results.
        """
        replay = self.replay
        if replay is None or not self.graph.has_no_side_effects:
            return False
        flat = self.arguments(given)
        if not replay.can_replay(flat) or not self.is_trusted(flat):
            return False
        with torch.no_grad():
            replay.start(flat)
        return True

    def call(self, flat: Sequence[Tensor], *, started: bool = False) -> MicrobatchResult:
        """Run the compiled step on its arguments; sums alias a recorded graph's memory."""
        layout, replay = self.graph.layout, self.replay
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", flat[0].device.type}:
                # The traced operations hold the casts already.
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if replay is None:
                results = self.run(*flat)
            else:
                results = replay.results(layout.sums) if started else replay(flat, layout.sums)
        return layout.restore(
            results, aliases_graph=replay is not None and replay.returned_uncopied
        )


class Compiler:
    """The compiled steps of one loss.

    Args:
        mode: As ``torch.compile`` knows it.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._entries: list[CompiledStep] = []
        self._size: int | None = None
        self._bounds: tuple[tuple[float, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiler, (self.mode,)  # a copy compiles for itself

    def rows(self, asked: int | None, batch_size: int) -> int:
        """Rows of the compiled graph: what the user asked for, else the size of the first batch."""
        if asked is None:
            asked = self._size = self._size or batch_size
        return asked

    def bounds_on(self, device: torch.device, norms: tuple[float, ...]) -> Tensor:
        """The clipping norms as an input of the graph; copied to the device when they change."""
        if self._bounds is None or self._bounds[0] != norms or self._bounds[1].device != device:
            self._bounds = norms, torch.tensor(norms, dtype=torch.float64, device=device)
        return self._bounds[1]

    @property
    def last(self) -> CompiledStep | None:
        """The graph that served last."""
        return self._entries[0] if self._entries else None

    def forget(self) -> None:
        """Drop all graphs."""
        self._entries = []

    def find(self, now: tuple[Any, ...]) -> CompiledStep | None:
        """The graph that serves a signature; None if there is none."""
        for index, entry in enumerate(self._entries):
            if entry.signature == now:
                if index:
                    self._entries.insert(0, self._entries.pop(index))
                return entry
        return None

    def make(
        self,
        inputs: Inputs,
        loss: GraphOfLoss,
        batch: Sequence[Any],
        given: Sequence[Tensor],
        settings: Settings,
        now: tuple[Any, ...],
    ) -> CompiledStep:
        """Trace and compile the step, and log how long it takes.

        Args:
            inputs: The arguments of the call.
            loss: The captured loss.
            batch: Rows of one microbatch.
            given: Parameters, tensors of the batch, tensors that the loss reads, padding and clipping norms.
            settings: Of the batch.
            now: The signature.

        Raises:
            CompileError: If there are too many graphs, or the step cannot be traced or compiled.
        """
        last = self.last
        reason = None if last is None else difference(now, last.signature)
        if len(self._entries) >= LIMIT:
            raise CompileError(
                f"the step was compiled for {LIMIT} different states already, and now {reason} is new again. What "
                "changes from step to step must be a tensor: in the batch, in a buffer, or changed in place. Make it "
                "one, or leave compile out."
            )
        started = time.perf_counter()
        *_, padding, bounds = given
        _log.warning(
            "clipgrad: compiling the step for %d samples at a time%s; this takes seconds to minutes, once.",
            padding.shape[0],
            f" again, since this changed: {reason}" if reason else "",
        )
        generators = SavedRngState(padding.device)
        try:
            graph = trace(inputs, loss, batch, padding, bounds, settings)
        finally:
            generators.restore()
        entry = CompiledStep(now, graph, backend.compile_graph(graph.module, self.mode))
        traced = time.perf_counter()
        try:
            entry.call(entry.arguments(given))
        except Exception as error:
            raise CompileError(
                f"torch.compile could not compile the traced step: {type(error).__name__}: {error} Leave compile out, "
                "or repair what PyTorch names."
            ) from error
        finally:
            generators.restore()
        compiled = time.perf_counter()
        _log.warning(
            "clipgrad: compiled in %.1f s (tracing %.1f s, compiling %.1f s).",
            compiled - started,
            traced - started,
            compiled - traced,
        )
        if backend.uses_cuda_graphs(self.mode) and recordable(graph.module, padding.device):
            entry.replay = _replay(entry, padding.device, len(inputs.params), batch, len(given))
        self._entries.insert(0, entry)
        return entry


def _replay(
    entry: CompiledStep, device: torch.device, params: int, batch: Sequence[Any], given: int
) -> Replay:
    """Parameters, and what the loss reads besides its batch, stay where they are; the rest does not."""
    samples = sum(isinstance(leaf, Tensor) for leaf in batch)
    read = given - params - samples - 2
    constants = len(entry.graph.constants)
    resident = [True] * params + [False] * samples + [True] * read + [False] * 2
    return Replay(entry.run, resident + [True] * constants, lambda: CudaRecorder(device))
