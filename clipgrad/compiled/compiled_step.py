"""One compiled graph, what it serves, and its recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipgrad.compiled.backend import Run
from clipgrad.compiled.check import is_compared
from clipgrad.compiled.cuda_graphs import Replay
from clipgrad.compiled.lengths import Lengths, Shapes
from clipgrad.compiled.trace import TracedStep
from clipgrad.engine.clip_and_sum import MicrobatchResult

RECORDINGS = 32
"""How many sizes of batches of one graph are recorded."""
WORTH = 2
"""How many batches of a size run before it is recorded, where lengths differ. A recording takes a few steps' time."""


@contextmanager
def plain_operations(device: torch.device) -> Iterator[None]:
    """What holds where a graph is compiled and where it runs; its operations contain the casts of autocast already."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@dataclass
class CompiledStep:
    """One compiled graph and what it was made for.

    Attributes:
        signature: What has to be equal for the graph to serve.
        lengths: The sizes of batches that it serves.
        graph: The traced step.
        run: The compiled step.
        record: Makes a recording of the compiled step; None where it cannot be recorded.
        replays: The recordings; a CUDA graph has fixed sizes, so each number of rows and each length has its own.
        runs: How many microbatches have run on it.
        ran: How many of them had each size.
    """

    signature: tuple[Any, ...]
    lengths: Lengths
    graph: TracedStep
    run: Run
    record: Callable[[], Replay] | None = None
    replays: dict[Shapes, Replay] = field(default_factory=dict)
    runs: int = 0
    ran: Counter[Shapes] = field(default_factory=Counter)

    def replay(self, shapes: Shapes) -> Replay | None:
        """The recording for batches of these sizes; None if there is none and none may be made."""
        known = self.replays.get(shapes)
        if known is not None or self.record is None or len(self.replays) >= RECORDINGS:
            return known
        if self.lengths.differ and self.ran[shapes] < WORTH:
            return None
        return self.replays.setdefault(shapes, self.record())

    def arguments(self, given: Sequence[Tensor], shapes: Shapes) -> list[Tensor]:
        """What the graph reads: the call's tensors, and those that the trace made of Python numbers."""
        flat = [*given, *self.graph.constants]
        return flat if self.replay(shapes) is not None else [tensor.detach() for tensor in flat]

    def prepare(self, given: Sequence[Tensor], shapes: Shapes) -> None:
        """Make the recording for batches of these sizes, if the step can be recorded."""
        if (replay := self.replay(shapes)) is not None:
            with plain_operations(given[0].device):
                replay.prepare(self.arguments(given, shapes))

    def is_trusted(self, flat: Sequence[Tensor], shapes: Shapes) -> bool:
        """Whether the next run needs no comparison with the eager step.

        A recording that this run would make needs one. Recordings that were made together with the graph need none.
        """
        replay = self.replay(shapes)
        return not is_compared(self.runs + 1) and (replay is None or replay.is_recorded_for(flat))

    def adds_rows(self, given: Sequence[Tensor], shapes: Shapes) -> bool:
        """Return whether the batch in ``given`` may lack rows, which a recording adds up to these sizes."""
        replay = self.replays.get(shapes)
        return replay is not None and replay.adds_rows([*given, *self.graph.constants])

    def call(self, flat: Sequence[Tensor], shapes: Shapes) -> MicrobatchResult:
        """Run the compiled step on its arguments; sums alias a recorded graph's memory."""
        layout, replay = self.graph.layout, self.replay(shapes)
        with plain_operations(flat[0].device):
            found = self.run(*flat) if replay is None else replay(flat, layout.sums)
        self.ran[shapes] += 1
        return layout.restore(found, aliases_graph=replay is not None and replay.returned_uncopied)
