"""``MicrobatchRunner`` runs the microbatches of a call on compiled graphs, and compares those not trusted yet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.compiled.check import compare, tolerance
from clipgrad.compiled.entry import Entry
from clipgrad.compiled.lengths import Shapes, shapes_of
from clipgrad.compiled.shape import fitted_batch, fitted_mask
from clipgrad.compiled.signature import refuse_modes, signature
from clipgrad.compiled.step import Compiler, Request
from clipgrad.engine.advice import ValueReadError
from clipgrad.engine.captured_loss import GraphOfLoss, LossGraphs
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings
from clipgrad.engine.foreign_code import refuse_saved_tensors_hooks
from clipgrad.engine.inputs import Inputs, copied
from clipgrad.engine.microbatch import run
from clipgrad.engine.rng_state import Generators
from clipgrad.errors import CompileMismatchError
from clipgrad.loss_graph import CannotCapture


class MicrobatchRunner:
    """Runs the microbatches of one call; looks at guards and signature once.

    Args:
        compiler: Keeps the compiled steps.
        graphs: Keeps the graphs of the loss.
        inputs: The arguments of the call.
        settings: Of the batch.
        size: Rows of the compiled graph.
    """

    def __init__(
        self,
        compiler: Compiler,
        graphs: LossGraphs,
        inputs: Inputs,
        settings: Settings,
        size: int,
    ) -> None:
        refuse_modes()
        refuse_saved_tensors_hooks()
        self._compiler, self._graphs = compiler, graphs
        self._inputs, self._settings, self._size = inputs, settings, size
        self._device = inputs.params[0].device
        self._bounds = compiler.bounds_on(self._device, settings.clipping.norms)
        self._entry: Entry | None = None
        self._loss: GraphOfLoss | None = None

    def __call__(self, rows: slice, mask: Tensor | None) -> MicrobatchResult:
        """Norms and clipped sums of one microbatch.

        Args:
            rows: Which samples.
            mask: Boolean, of these samples: those that are padding. None if none is.

        Raises:
            CompileError: If the step cannot be compiled, or was compiled for too many signatures.
            CompileMismatchError: If the compiled step does not compute what the eager one does.
        """
        settings, size = self._settings, self._size
        batch = self._inputs.rows(rows)
        count = rows.stop - rows.start
        padded = fitted_batch(batch, size)
        padding = fitted_mask(mask, count, size, self._device)
        started = None
        if self._entry is None or self._loss is None:
            started = self._ahead(padded, padding)
            self._loss = self._captured(batch, mask)
        loss = self._loss
        given = self._given(padded, loss.tensors, padding)
        shapes = shapes_of(padded)
        entry = self._entry = self._entry or self._look(padded, given, shapes)
        flat = entry.arguments(given, shapes)
        # A replay that was started is of no use if the loss reads other tensors by now.
        in_time = started is not None and started[0] is entry and _same(started[1], loss.tensors)
        generators = None if in_time or entry.is_trusted(flat, shapes) else Generators(self._device)
        result = entry.call(flat, shapes, started=in_time)
        dropping = entry.graph.asks and (
            settings.options.nan_safe or mask is not None or count < size
        )
        if (dropping or generators is not None) and not bool(result.all_finite):
            # Rare: a sample has to be taken out of the activations, which this graph does not do; and a batch
            # with one proves little.
            entry.runs += entry.runs > 0
            return self._eagerly(batch, mask)
        if generators is not None:
            with generators.replayed():
                eager = self._eagerly(padded, padding)
            slack = tolerance(entry.graph.module, self._device)
            try:
                compare(result, eager, self._inputs.names, settings.clipping, slack)
            except CompileMismatchError as error:
                if not entry.runs:
                    raise
                self._compiler.forget()
                self._graphs.forget()
                raise CompileMismatchError(
                    f"{error} Earlier batches agreed, so the loss has changed in a way that PyTorch's guards do not "
                    f"see, after microbatch {(entry.runs + 1) // 2} of this graph at the earliest. The next batch is "
                    "compiled anew."
                ) from None
        entry.runs += 1
        entry.tensors = loss.tensors
        return _first(result, count)

    def _captured(self, batch: Sequence[Any], mask: Tensor | None) -> GraphOfLoss:
        """The captured loss. Where PyTorch cannot capture it, what the eager step says of it is said first."""
        try:
            return self._graphs.of(self._inputs)
        except CannotCapture:
            with suppress(ValueReadError):
                self._eagerly(copied(batch), mask)
            raise

    def _given(self, batch: Sequence[Any], read: Sequence[Tensor], padding: Tensor) -> list[Tensor]:
        tensors = [leaf for leaf in batch if isinstance(leaf, Tensor)]
        return [*self._inputs.params, *tensors, *read, padding, self._bounds]

    def _ahead(
        self, batch: Sequence[Any], padding: Tensor
    ) -> tuple[Entry, Sequence[Tensor]] | None:
        """Start the graph that served last; on a GPU it runs while the guards are evaluated."""
        last = self._compiler.last
        if last is None or not last.start(
            self._given(batch, last.tensors, padding), shapes_of(batch)
        ):
            return None
        return last, last.tensors

    def _look(self, batch: Sequence[Any], given: Sequence[Tensor], shapes: Shapes) -> Entry:
        inputs, settings, loss = self._inputs, self._settings, self._loss
        assert loss is not None
        now = signature(inputs, loss, self._size, settings.clipping)
        return self._compiler.find(now, shapes) or self._compiler.make(
            Request(inputs, loss, batch, given, settings, now, shapes)
        )

    def _eagerly(self, batch: Sequence[Any], mask: Tensor | None) -> MicrobatchResult:
        """The eager step: of the user's Python, unless that asks for values of tensors."""
        inputs = self._inputs
        try:
            return run(inputs.loss, inputs.names, inputs.params, batch, mask, self._settings)
        except ValueReadError:
            if self._loss is None:
                raise
            loss = self._loss.loss()
            return run(loss, inputs.names, inputs.params, batch, mask, self._settings)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _first(result: MicrobatchResult, count: int) -> MicrobatchResult:
    """The result without the rows that were added."""
    if result.values.shape[0] == count:
        return result
    return MicrobatchResult(
        result.sums,
        result.values[:count],
        [norms[:count] for norms in result.norms],
        tree_map(lambda leaf: leaf[:count], result.aux),
        result.nonfinite[:count],
        result.all_finite,
        result.aliases_graph,
    )
