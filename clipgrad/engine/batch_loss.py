"""The loss of one batch: the user's Python, or, where that cannot run on all samples at once, PyTorch's graph of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from clipgrad.engine import stale_values
from clipgrad.engine.error_messages import COMPILED_CODE, NeedsGraphError, ValueReadError
from clipgrad.engine.inputs import Inputs, Loss
from clipgrad.errors import NotPerSampleError

# PyTorch's capture takes seconds to import, so it is imported where it is first needed.
if TYPE_CHECKING:
    from clipgrad.engine.captured_loss import LossGraphs

_T = TypeVar("_T")


class LossHistory:
    """What is known of a loss from earlier batches: its graphs, and whether its Python was refused.

    Args:
        keep_batch_dim: Whether the loss sees a batch axis of one.
        has_aux: Whether it returns auxiliary values beside the loss; None if that shows when it runs.
    """

    def __init__(self, *, keep_batch_dim: bool, has_aux: bool | None) -> None:
        self._keep_batch_dim, self._has_aux = keep_batch_dim, has_aux
        self._graphs: LossGraphs | None = None
        self.begins_with_graph = False
        self.needs_graph = False
        """Whether torch.compile compiled the loss or a part of the model; PyTorch would compile clipgrad with it."""
        self.passes = 0

    @property
    def graphs(self) -> LossGraphs:
        """The graphs of the loss; the first use imports PyTorch's capture."""
        from clipgrad.engine.captured_loss import LossGraphs

        if self._graphs is None:
            self._graphs = LossGraphs(keep_batch_dim=self._keep_batch_dim, has_aux=self._has_aux)
        return self._graphs

    def of(self, inputs: Inputs) -> BatchLoss:
        """The loss of one batch."""
        return BatchLoss(self, inputs)


class BatchLoss:
    """The loss of one batch, for all of its microbatches; PyTorch's guards are evaluated once.

    Args:
        history: What earlier batches have shown about the loss.
        inputs: The batch.
    """

    def __init__(self, history: LossHistory, inputs: Inputs) -> None:
        self._loss_history, self._inputs = history, inputs
        self._graph: Loss | None = None
        self._asked = False

    def run(self, body: Callable[[Loss], _T]) -> _T:
        """Run ``body`` on the loss: on the graph if one is needed, else on the user's Python.

        Raises:
            NotPerSampleError: If neither can be attributed to single samples.
        """
        self._loss_history.passes += 1
        with stale_values.searched(self._loss_history.passes):
            return self._run(body)

    def _run(self, body: Callable[[Loss], _T]) -> _T:
        history = self._loss_history
        if (history.begins_with_graph or history.needs_graph) and not self._asked:
            self._graph, self._asked = self._graph_or_none(), True
        if self._graph is not None:
            return body(self._graph)
        try:
            return body(self._inputs.loss)
        except NeedsGraphError as refusal:
            self._graph = self._graph_instead(refusal)
            self._loss_history.begins_with_graph = True
            return body(self._graph)

    def _graph_instead(self, refusal: NeedsGraphError) -> Loss:
        """The captured loss; where PyTorch cannot capture it, the refusal stands."""
        from clipgrad.loss_graph import CannotCapture

        try:
            return self._loss_history.graphs.graph_for(self._inputs).loss()
        except CannotCapture as reason:
            does = "It does so" if isinstance(refusal, ValueReadError) else "PyTorch's capture ends"
            where = f" {does} at {reason.where}." if reason.where else ""
            raise NotPerSampleError(f"{refusal}{where}") from reason

    def _graph_or_none(self) -> Loss | None:
        """The captured loss; None where PyTorch cannot capture what it does now, so that its Python has to run."""
        from clipgrad.loss_graph import CannotCapture

        try:
            return self._loss_history.graphs.graph_for(self._inputs).loss()
        except CannotCapture as reason:
            if self._loss_history.needs_graph:
                why = str(reason).rstrip(".")
                raise NotPerSampleError(f"{COMPILED_CODE} PyTorch's capture: {why}.") from reason
            return None
