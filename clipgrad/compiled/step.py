"""``Compiler``: which graph serves a microbatch, making it, and running it."""

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
from clipgrad.compiled.cuda_graphs import (
    CudaRecorder,
    Replay,
    recordable,
)
from clipgrad.compiled.observe import Observer
from clipgrad.compiled.rehearsal import rehearse
from clipgrad.compiled.signature import describe, describe_all, difference
from clipgrad.compiled.state import State
from clipgrad.compiled.trace import Graph, trace
from clipgrad.compiled.walk import write_down
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.rng_state import Generators
from clipgrad.errors import CompileError

LIMIT = 8
_log = logging.getLogger("clipgrad")


@dataclass
class Entry:
    """One compiled graph and what it was made for."""

    signature: tuple[Any, ...]
    state: State
    graph: Graph
    run: backend.Run
    constants: tuple[Any, ...]
    replay: Replay | None = None
    checked: bool = False

    def obstacle(self, now: tuple[Any, ...]) -> str | None:
        """What has changed since the graph was made; None if it still serves."""
        found = difference(now, self.signature) or self.state.change()
        if found is None and describe_all(self.graph.constants) != self.constants:
            return "shape, dtype, device or requires_grad of a tensor that the loss reads"
        return found

    def arguments(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What the graph reads: what the call gives, and what the loss finds elsewhere, as it is now."""
        flat = [*given, *self.graph.constants]
        return flat if self.replay is not None else [tensor.detach() for tensor in flat]

    def trusted(self, flat: Sequence[Tensor]) -> bool:
        """Whether what would run now was compared with the eager step."""
        return self.checked and (self.replay is None or self.replay.settled(flat))

    def start(self, given: Sequence[Tensor]) -> bool:
        """Replay the step ahead of all questions if nothing can come of it that could not be forgotten.

        Then only the recording's own memory is written to: if the graph turns out not to serve, nobody looks there.

        Returns:
            Whether it was, so that ``call`` has only to fetch the results.
        """
        replay = self.replay
        if replay is None or not self.checked or not self.graph.forgettable:
            return False
        flat = self.arguments(given)
        if not replay.fits(flat):
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
        return layout.restore(results, aliases_graph=replay is not None and replay.lends)


class Compiler:
    """The compiled steps of one gradient transform.

    Args:
        mode: As ``torch.compile`` knows it.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._entries: list[Entry] = []
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

    def ahead(self, given: Sequence[Tensor]) -> Entry | None:
        """The graph that served last, if it could be started on these arguments before anybody knows that it serves."""
        last = self._entries[0] if self._entries else None
        return last if last is not None and last.start(given) else None

    def find(self, now: tuple[Any, ...]) -> Entry | None:
        """The graph that serves a signature and the state as it is; None if there is none."""
        for index, entry in enumerate(self._entries):
            if entry.obstacle(now) is None:
                if index:
                    self._entries.insert(0, self._entries.pop(index))
                return entry
        return None

    def make(
        self,
        inputs: Inputs,
        batch: Sequence[Any],
        padding: Tensor,
        bounds: Tensor,
        settings: Settings,
        now: tuple[Any, ...],
        given: Sequence[Tensor],
    ) -> Entry:
        """Trace the step twice and compile the graph, telling the user who waits.

        Args:
            inputs: The arguments of the call.
            batch: Rows of one microbatch.
            padding: Which of them are none.
            bounds: The clipping norms.
            settings: Of the transform.
            now: The signature.
            given: Parameters, tensors of the batch and other tensors, padding and bounds, detached.
        """
        reason = self._entries[0].obstacle(now) if self._entries else None
        if len(self._entries) >= LIMIT:
            raise CompileError(
                f"the step was compiled for {LIMIT} different states already, and now {reason} is new again. What "
                "changes from step to step must be a tensor: in the batch, in a buffer, or changed in place. Make it "
                "one, or leave compile out."
            )
        started = time.perf_counter()
        _log.warning(
            "clipgrad: compiling the step for %d samples at a time%s; this takes seconds to minutes, once.",
            padding.shape[0],
            f" again, since this changed: {reason}" if reason else "",
        )
        generators = Generators(padding.device)
        graph, state = _trace_twice(inputs, batch, padding, bounds, settings, generators)
        entry = Entry(
            now,
            state,
            graph,
            backend.compile_graph(graph.module, self.mode),
            describe_all(graph.constants),
        )
        traced = time.perf_counter()
        try:
            entry.call(entry.arguments(given))
        except Exception as error:
            raise CompileError(
                f"torch.compile could not compile the traced step ({type(error).__name__}: {error}). Leave compile "
                "out, or see PyTorch's message for what it needs (a C++ compiler on CPU, Triton on a GPU)."
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
            entry.replay = _replay(entry, padding.device, len(inputs.params), len(given))
        self._entries.insert(0, entry)
        return entry


def _replay(entry: Entry, device: torch.device, params: int, given: int) -> Replay:
    """Parameters, and what the loss finds outside of its arguments, stay where they are; the rest does not."""
    constants = len(entry.graph.constants)
    resident = [True] * params + [False] * (given - params) + [True] * constants
    return Replay(entry.run, resident, lambda: CudaRecorder(device))


def _trace_twice(
    inputs: Inputs,
    batch: Sequence[Any],
    padding: Tensor,
    bounds: Tensor,
    settings: Settings,
    generators: Generators,
) -> tuple[Graph, State]:
    """The graph, and the state it was made from.

    The eager step runs first, so that what the loss makes at its first call is there before anything is written down.
    The second trace must give the same graph.
    """
    rehearse(inputs, batch, padding, settings)

    def once(observer: Observer | None) -> Graph:
        generators.restore()
        return trace(
            inputs.loss,
            inputs.names,
            inputs.params,
            batch,
            inputs.others,
            padding,
            bounds,
            settings,
            observer,
        )

    observer = Observer()
    first = once(observer)
    seen = observer.seen
    seen.forget_temporaries()
    state = write_down(seen, {"loss": inputs.fn, "batch": inputs.constants})
    versions = [constant._version for constant in first.constants]
    again = once(None)
    generators.restore()
    state.forget_results(again.constants)
    if (change := state.change()) is not None:
        raise CompileError(
            f"the loss changes what it reads while it runs: {change}. A compiled step would not do that. Return the "
            "value with has_aux=True, or change it outside of the loss."
        )
    if versions != [constant._version for constant in first.constants]:
        raise CompileError(
            "the loss writes in place to a tensor that it finds outside of its arguments. Return the value with "
            "has_aux=True, or write to the tensor outside of the loss."
        )
    if first.text() != again.text() or not _same_constants(first, again):
        raise CompileError(
            "the loss did something else when it ran again on the same batch: it depends on something outside of its "
            "arguments, such as Python's or NumPy's random numbers, the time, or an iterator. Draw with torch's "
            "functions inside the loss, or pass the value in the batch."
        )
    return first, state


def _same_constants(first: Graph, again: Graph) -> bool:
    """By identity, or by value if the loss makes them anew each time it runs."""
    return len(first.constants) == len(again.constants) and all(
        a is b
        or (fresh and describe(a) == describe(b) and torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b, fresh in zip(first.constants, again.constants, first.fresh, strict=True)
    )
