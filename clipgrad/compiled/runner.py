"""This module runs microbatches on compiled graphs, and compares some runs with the eager step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.compiled.added_rows import WithAddedRows
from clipgrad.compiled.check import compare, rounding
from clipgrad.compiled.compiled_step import CompiledStep
from clipgrad.compiled.compiler import Compiler, Request
from clipgrad.compiled.eager import EagerStep
from clipgrad.compiled.lengths import shapes_of
from clipgrad.compiled.shape import Rows, pad_batch
from clipgrad.compiled.signature import refuse_modes, signature
from clipgrad.engine.captured_loss import GraphOfLoss, LossGraphs
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings
from clipgrad.engine.error_messages import ValueReadError
from clipgrad.engine.foreign_code import refuse_saved_tensors_hooks
from clipgrad.engine.inputs import Inputs, copy_samples
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.errors import CompileMismatchError
from clipgrad.loss_graph import CannotCapture


class MicrobatchRunner:
    """This class runs the microbatches of one call, and evaluates guards and signature once.

    Args:
        compiler: Holds the compiled steps.
        graphs: Holds the graphs of the loss.
        inputs: The arguments of the call.
        settings: The resolved options.
        rows: How many rows run together.
    """

    def __init__(
        self,
        compiler: Compiler,
        graphs: LossGraphs,
        inputs: Inputs,
        settings: Settings,
        rows: Rows,
    ) -> None:
        refuse_modes()
        refuse_saved_tensors_hooks()
        self._compiler, self._graphs = compiler, graphs
        self._inputs, self._settings, self._rows = inputs, settings, rows
        self._device = inputs.params[0].device
        self._bounds = compiler.bounds_on(self._device, settings.clipping.norms)
        self._entry: CompiledStep | None = None
        self._loss: GraphOfLoss | None = None

    def __call__(self, rows: slice, mask: Tensor | None) -> MicrobatchResult:
        """Compute norms and clipped sums of one microbatch.

        Args:
            rows: The samples of the microbatch.
            mask: Boolean mask of these samples, true for padding; None without padding.

        Raises:
            CompileError: If the step cannot be compiled, or was compiled for too many signatures.
            CompileMismatchError: If the compiled step and the eager step have different results.
        """
        found = self._run(rows, mask, self._rows.padded(rows.stop - rows.start))
        if found is None:  # a graph is made on the largest batch that it has to serve
            found = self._run(rows, mask, self._rows.most)
        assert found is not None
        return found

    def _run(self, rows: slice, mask: Tensor | None, size: int) -> MicrobatchResult | None:
        """Run one microbatch padded to ``size`` rows; None if there is no graph, and making one takes more rows."""
        settings, count = self._settings, rows.stop - rows.start
        piece = WithAddedRows(self._inputs.rows(rows), mask, count, size, self._device)
        if self._loss is None:
            self._loss = self._capture_loss(piece.batch, mask)
            if self._compiler.last is None and self._loss.captured.changes_state:
                # A loss may set itself up in its first call, as Hugging Face's classifiers do. A graph of the loss
                # before that would be compiled for one batch.
                with suppress(CannotCapture):
                    self._loss = self._graphs.graph_for(self._inputs)
        loss = self._loss
        entry = self._entry = self._find_or_compile(piece)
        if entry is None:
            return None
        if entry.runs == 0 and not entry.replays:
            self._record_ahead(entry, piece)
        given = self._graph_inputs(piece.fitted, loss.tensors, piece.padding)
        if count < size and not entry.adds_rows(given, piece.shapes):
            given = self._graph_inputs(piece.padded, loss.tensors, piece.padding)
        flat = entry.arguments(given, piece.shapes)
        trusted = entry.is_trusted(flat, piece.shapes)
        generators = None if trusted else SavedRngState(self._device)
        result = entry.call(flat, piece.shapes)
        dropping = entry.graph.needs_finite_check and (
            settings.options.nan_safe or mask is not None or count < size
        )
        if (dropping or generators is not None) and not bool(result.all_finite):
            # This is rare. The graph cannot zero a sample's factors, and such a batch is a weak comparison.
            entry.runs += entry.runs > 0
            return self._eager()(piece.batch, mask)
        if generators is not None:
            slack, step = rounding(entry.graph.module, self._device)
            eager = self._eager()
            expected = eager.expected(piece.padded, piece.padding, generators)
            nearby = eager.nearby(piece.padded, piece.padding, generators, step)
            try:
                compare(result, expected, self._inputs.names, settings.clipping, slack, nearby)
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
        return _without_added_rows(result, count)

    def _capture_loss(self, batch: Sequence[Any], mask: Tensor | None) -> GraphOfLoss:
        """Return the captured loss. If PyTorch cannot capture it, an error of the eager step is raised first."""
        try:
            return self._graphs.graph_for(self._inputs)
        except CannotCapture:
            with suppress(ValueReadError):
                self._eager()(copy_samples(batch), mask)
            raise

    def _graph_inputs(
        self, batch: Sequence[Any], read: Sequence[Tensor], padding: Tensor
    ) -> list[Tensor]:
        tensors = [leaf for leaf in batch if isinstance(leaf, Tensor)]
        return [*self._inputs.params, *tensors, *read, padding, self._bounds]

    def _record_ahead(self, entry: CompiledStep, piece: WithAddedRows) -> None:
        """Record a new graph for all numbers of rows to which batches are padded; compiling it took far longer.

        The first recording is of the largest number, since later ones share its memory. If lengths differ as well,
        too many sizes are possible.
        """
        assert self._loss is not None
        if entry.record is None or entry.lengths.differ:
            return
        assert piece.size == self._rows.most
        for rows in sorted({*map(self._rows.padded, self._rows.few)}, reverse=True):
            fewer = pad_batch(
                [x[:rows] if isinstance(x, Tensor) else x for x in piece.padded], rows
            )
            given = self._graph_inputs(fewer, self._loss.tensors, piece.padding[:rows])
            entry.prepare(given, shapes_of(fewer))

    def _find_or_compile(self, piece: WithAddedRows) -> CompiledStep | None:
        """Return the graph that serves these sizes; None if there is none, and a larger batch has to make it."""
        shapes = piece.shapes
        if self._entry is not None and self._entry.lengths.serve(shapes):
            return self._entry
        inputs, settings, loss, most = self._inputs, self._settings, self._loss, self._rows.most
        assert loss is not None
        now = signature(inputs, loss, settings.clipping)
        entry = self._compiler.find(now, shapes)
        if entry is None and piece.size == most:
            given = self._graph_inputs(piece.padded, loss.tensors, piece.padding)
            request = Request(inputs, loss, piece.padded, given, settings, now, shapes, self._rows)
            entry = self._compiler.make(request)
            if self._rows.are_symbolic:
                self._rows = replace(self._rows, fewest=min(self._compiler.fewest_rows, most))
        return entry

    def _eager(self) -> EagerStep:
        """Return the eager step of the loss as it was captured."""
        no_side_effects = self._entry is not None and self._entry.graph.has_no_side_effects
        return EagerStep(self._inputs, self._settings, self._loss, may_split=no_side_effects)


def _without_added_rows(result: MicrobatchResult, count: int) -> MicrobatchResult:
    """Return the result without the rows that were added."""
    if result.values.shape[0] == count:
        return result
    has_aux = not isinstance(result.aux, tuple) or bool(result.aux)
    return MicrobatchResult(
        result.sums,
        result.values[:count],
        [norms[:count] for norms in result.norms],
        tree_map(lambda leaf: leaf[:count], result.aux) if has_aux else (),
        result.nonfinite[:count],
        result.all_finite,
        result.aliases_graph,
    )
