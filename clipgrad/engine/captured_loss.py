"""This module turns the captured graph of a loss into a function that the engine can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipgrad.engine.inputs import Inputs, Loss
from clipgrad.loss_graph import CapturedLoss, LossCapture


class LossGraphs:
    """This class holds the graphs of one loss; PyTorch's guards choose a graph at each batch.

    Args:
        keep_batch_dim: Whether the loss sees a batch axis of one.
        has_aux: Whether the loss also returns auxiliary values.
    """

    def __init__(self, *, keep_batch_dim: bool, has_aux: bool) -> None:
        self._keep_batch_dim = keep_batch_dim
        self._has_aux = has_aux
        self._fn: Any = None
        self._capture: LossCapture | None = None
        self._captures = 0

    def forget(self) -> None:
        """Discard all graphs, so that the next batch captures the loss again."""
        self._capture = None

    def graph_for(self, inputs: Inputs) -> GraphOfLoss:
        """Return the graph for a batch.

        Args:
            inputs: The batch, of at least one sample.

        Raises:
            CannotCapture: If PyTorch cannot capture the loss.
            NotPerSampleError: If the loss uses a tensor that requires grad and is not a parameter.
        """
        call = inputs.sample_call()
        if self._capture is None or call.fn is not self._fn:
            self._fn, self._capture = call.fn, LossCapture(call.fn)
            self._captures += 1
        first = 0 if not self._keep_batch_dim else slice(0, 1)
        sample = [leaf[first] if isinstance(leaf, Tensor) else leaf for leaf in inputs.batch]
        with call.context():
            captured = self._capture.graph(call.arguments(sample), call.parameters, sample)
        return GraphOfLoss(captured, self._has_aux, self._captures)


@dataclass(frozen=True)
class GraphOfLoss:
    """This class holds a captured loss for one call.

    Attributes:
        captured: The graph, and its inputs other than parameters and sample.
        has_aux: Whether the loss returns auxiliary values.
        capture: Number of the capture; each capture counts its graphs from zero.
    """

    captured: CapturedLoss
    has_aux: bool
    capture: int

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that the loss reads besides parameters and sample: buffers, attributes, closures."""
        return [value for value in self.captured.constants if isinstance(value, Tensor)]

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that two calls share exactly if they use the same graph and the same Python numbers."""
        numbers = [value for value in self.captured.constants if not isinstance(value, Tensor)]
        return (self.capture, self.captured.number, *numbers)

    def loss(self, tensors: Sequence[Tensor] | None = None) -> Loss:
        """Return the graph as a loss.

        Args:
            tensors: Tensors to read instead of ``self.tensors``.
        """
        captured = self.captured
        constants = list(captured.constants)
        if tensors is not None:
            given = iter(tensors)
            constants = [next(given) if isinstance(value, Tensor) else value for value in constants]

        def loss(leaves: Sequence[Tensor], sample: Sequence[Any]) -> Any:
            value, aux = captured(leaves, sample, constants)
            return (value, aux) if self.has_aux or aux is not None else value

        return loss
