"""``Compiler``: it finds the graph that serves a microbatch, and makes it where there is none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipgrad.compiled import backend
from clipgrad.compiled.compiled_step import CompiledStep, plain_operations
from clipgrad.compiled.cuda_graphs import Common, Replay, recordable
from clipgrad.compiled.lengths import Lengths, Shapes, with_rows
from clipgrad.compiled.recorder import CudaRecorder, Pool
from clipgrad.compiled.shape import Rows, recorded_sizes
from clipgrad.compiled.signature import READS, difference
from clipgrad.compiled.trace import TracedStep, trace
from clipgrad.engine.captured_loss import GraphOfLoss
from clipgrad.engine.clip_and_sum import Settings
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.errors import CompileError

LIMIT = 8
FEWEST_ROWS = 2
"""A symbol never stands for a single row, because PyTorch makes a number of a size of 1."""
TRIALS = 2
"""How often a graph for all lengths may fail before every length gets its own graph."""
_log = logging.getLogger("clipgrad")


@dataclass(frozen=True)
class Request:
    """What a graph is made from.

    Attributes:
        inputs: The arguments of the call.
        loss: The captured loss.
        batch: Rows of one microbatch.
        given: Parameters, tensors of the batch, tensors that the loss reads, padding and clipping norms.
        settings: Of the batch.
        signature: What has to be equal for the graph to serve again.
        shapes: Sizes of the batch, which has the largest number of rows.
        rows: How many rows the graph should serve.
    """

    inputs: Inputs
    loss: GraphOfLoss
    batch: Sequence[Any]
    given: Sequence[Tensor]
    settings: Settings
    signature: tuple[Any, ...]
    shapes: Shapes
    rows: Rows


class _Traced(NamedTuple):
    """This class holds a traced step, what it serves, and the seconds that the trace took."""

    graph: TracedStep
    lengths: Lengths
    seconds: float


class Compiler:
    """The compiled steps of one loss.

    Args:
        mode: As ``torch.compile`` knows it.

    Attributes:
        fewest_rows: The smallest number of rows that every graph with symbolic rows serves.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._entries: list[CompiledStep] = []
        self._size: int | None = None
        self._trials = TRIALS
        self.fewest_rows = FEWEST_ROWS
        self._bounds: tuple[tuple[float, ...], Tensor] | None = None
        # Graphs of one loss never run at the same time, so their recordings share memory.
        self._pool: Pool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiler, (self.mode,)  # a copy compiles for itself

    def rows(
        self, asked: int | None, room: int | None, batch_size: int, device: torch.device
    ) -> Rows:
        """Return how many rows run together.

        One graph serves every number of rows, unless the user asked for a number, the step needs one, or nothing is
        known of the sizes on a GPU. A recording serves one number, so batches are padded to one of a few numbers, and
        of fewer numbers if lengths differ as well.

        Args:
            asked: The user's ``microbatch_size``.
            room: The largest batch that runs at once where the user asked for no number; None takes the first batch's.
            batch_size: Of the batch at hand.
            device: Of the parameters.
        """
        if asked is not None:
            return Rows(asked, asked)
        if room is None:
            room = self._size = self._size or batch_size
            if device.type != "cpu":
                return Rows(room, room)  # code for one number is faster
        few: tuple[int, ...] = ()
        if backend.uses_cuda_graphs(self.mode, device):
            few = recorded_sizes(room, apart=1.0) if self._lengths_differ else recorded_sizes(room)
        return Rows(min(self.fewest_rows, room), room, few)

    @property
    def _lengths_differ(self) -> bool:
        """Return whether a graph was made for several lengths."""
        return any(entry.lengths.differ for entry in self._entries)

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
        self._entries, self._trials, self.fewest_rows = [], TRIALS, FEWEST_ROWS
        self._pool = None

    def find(self, now: tuple[Any, ...], shapes: Shapes) -> CompiledStep | None:
        """The graph that serves a signature and the sizes of a batch; None if there is none."""
        for index, entry in enumerate(self._entries):
            if entry.signature == now and entry.lengths.serve(shapes):
                if index:
                    self._entries.insert(0, self._entries.pop(index))
                return entry
        return None

    def make(self, request: Request) -> CompiledStep:
        """Trace and compile the step, and log how long it takes.

        Raises:
            CompileError: If there are too many graphs, or the step cannot be traced or compiled.
        """
        last = self.last
        reason = (
            None
            if last is None
            else difference(request.signature, last.signature) or "lengths in the batch"
        )
        if len(self._entries) >= LIMIT:
            raise CompileError(
                f"the step was compiled for {LIMIT} different states already, and now {reason} is new again. What "
                "changes from step to step must be a tensor: in the batch, in a buffer, or changed in place. Make it "
                "one, or leave compile out."
            )
        _log.warning(
            "clipgrad: compiling the step for %s samples at a time%s; this takes seconds to minutes, once.",
            f"up to {request.rows.most}" if request.rows.are_symbolic else request.rows.most,
            f" again, since this changed: {reason}" if reason else "",
        )
        entry = self._with_symbols(request)
        if request.rows.are_symbolic:
            fewest = request.rows.most if entry is None else entry.lengths.fewest_rows()
            self.fewest_rows = max(self.fewest_rows, fewest)
        entry = entry or self._without_symbols(request)
        self._entries.insert(0, entry)
        return entry

    def _with_symbols(self, request: Request) -> CompiledStep | None:
        """Return a graph for every number of rows, and for every length after a second one; None if this fails."""
        shapes, rows = request.shapes, request.rows
        other_rows = [with_rows(shapes, rows.most + 1)] if rows.are_symbolic else []
        seen = [
            known
            for entry in self._entries
            if difference(request.signature, entry.signature) in (None, READS)
            for known in entry.lengths.seen
        ]
        if seen and self._trials:
            entry = self._compiled_or_none(request, Lengths(*seen, *other_rows, shapes))
            if entry is not None:
                return entry
            self._trials -= 1
        return self._compiled_or_none(request, Lengths(*other_rows, shapes))

    def _compiled_or_none(self, request: Request, lengths: Lengths) -> CompiledStep | None:
        """Return a graph with symbols; None if no size needs a symbol, or if the trace with symbols fails."""
        if not lengths.have_symbols:
            return None
        try:
            return self._compiled(request, self._traced(request, lengths))
        # PyTorch raises errors of many types here. What is wrong with the loss is raised again without symbols.
        except Exception as error:
            _log.info("clipgrad: no graph serves batches of all sizes: %s", error)
            return None

    def _without_symbols(self, request: Request) -> CompiledStep:
        """Return a graph for the sizes of the batch at hand, traced on the batch itself if nothing else works.

        Raises:
            CompileError: If it cannot be traced or compiled.
        """
        try:
            traced = self._traced(request, Lengths(request.shapes))
        # What is wrong with the loss is raised again.
        except Exception as error:
            _log.info("clipgrad: the step cannot be traced on fake tensors: %s", error)
            traced = self._traced(request, Lengths(request.shapes, on_real_tensors=True))
        return self._compiled(request, traced)

    def _traced(self, request: Request, lengths: Lengths) -> _Traced:
        """Trace the step for these lengths.

        Raises:
            CompileError: If it cannot be traced.
        """
        *_, padding, bounds = request.given
        generators = SavedRngState(padding.device)
        started = time.perf_counter()
        try:
            graph = trace(
                request.inputs,
                request.loss,
                request.batch,
                padding,
                bounds,
                request.settings,
                lengths,
            )
        finally:
            generators.restore()
        lengths.refuse_unless_open(request.shapes)
        return _Traced(graph, lengths, time.perf_counter() - started)

    def _compiled(self, request: Request, traced: _Traced) -> CompiledStep:
        """Compile a traced step, and run it once.

        Raises:
            CompileError: If it cannot be compiled.
        """
        graph, lengths, tracing = traced
        device = request.given[0].device
        generators = SavedRngState(device)
        started = time.perf_counter()
        flat = [tensor.detach() for tensor in (*request.given, *graph.constants)]
        try:
            with plain_operations(device):
                run = backend.compile_graph(graph.module, self.mode, lengths.examples(flat))
                run(*flat)
        except Exception as error:
            raise CompileError(
                f"PyTorch could not compile the traced step: {type(error).__name__}: {error} Leave compile out, or "
                "repair what PyTorch names."
            ) from error
        finally:
            generators.restore()
        lengths.refuse_unless_open(request.shapes)
        compiling = time.perf_counter() - started
        _log.warning(
            "clipgrad: compiled in %.1f s (tracing %.1f s, compiling %.1f s)%s.",
            tracing + compiling,
            tracing,
            compiling,
            _served(lengths) if lengths.have_symbols else "",
        )
        entry = CompiledStep(request.signature, lengths, graph, run)
        if backend.uses_cuda_graphs(self.mode, device) and recordable(graph.module, device):
            if self._pool is None or self._pool.device != device:
                self._pool = Pool(device)
            entry.record = _recording(entry, request, self._pool)
        return entry


def _served(lengths: Lengths) -> str:
    """Return for which batches a graph with symbols serves, as the log says it."""
    fewest = lengths.fewest_rows()
    return (
        ", for batches of every size" if fewest <= FEWEST_ROWS else f", for {fewest} rows or more"
    )


def _recording(entry: CompiledStep, request: Request, pool: Pool) -> Callable[[], Replay]:
    """Return a function that makes a recording.

    A recording copies what does not stay at one address. Parameters stay, and so do tensors that the loss reads besides
    its batch. If parameters are gathered for each batch, neither stays: frozen parameters are among those tensors.
    """
    stay = not request.settings.ranks.parameters_move
    params = len(request.inputs.params)
    samples = sum(isinstance(leaf, Tensor) for leaf in request.batch)
    constants = len(entry.graph.constants)
    read = [stay and resident for resident in request.loss.are_resident]
    resident = [stay] * params + [False] * samples + read + [False] * 2 + [True] * constants
    common = Common(range(params, params + samples))
    return lambda: Replay(entry.run, resident, common, lambda: CudaRecorder(pool))
