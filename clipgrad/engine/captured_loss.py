"""This module turns the captured graph of a loss into a function that the engine can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipgrad.engine.inputs import Inputs, Loss
from clipgrad.engine.whole_tensors import whole_tensor_error
from clipgrad.loss_graph import CapturedLoss, LossCapture


class LossGraphs:
    """This class holds the graphs of one loss; PyTorch's guards choose a graph at each batch.

    Args:
        keep_batch_dim: Whether the loss sees a batch axis of one.
        has_aux: Whether the loss also returns auxiliary values; None if that shows when it runs.
    """

    def __init__(self, *, keep_batch_dim: bool, has_aux: bool | None) -> None:
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
            NotPerSampleError: If the loss uses a tensor of the whole batch, or one that requires grad and is not a
                parameter.
        """
        call = inputs.sample_call()
        if self._capture is None or call.fn is not self._fn:
            self._fn, self._capture = call.fn, LossCapture(call.fn)
            self._captures += 1
        sample = [self._first(leaf) if isinstance(leaf, Tensor) else leaf for leaf in inputs.batch]
        with call.context():
            captured = self._capture.graph(call.arguments(sample), call.parameters, sample)
        for value in captured.constants:
            if id(value) in inputs.whole and isinstance(value, Tensor):
                raise whole_tensor_error(value, "an operation")
        return GraphOfLoss(captured, self._has_aux, self._captures, inputs.params[0].device)

    def _first(self, leaf: Tensor) -> Tensor:
        """Return the first sample without what PyTorch's guards would see of the batch: its size and its strides."""
        sample = leaf[0] if leaf.requires_grad else leaf[0].data  # the latter is no view
        return sample[None] if self._keep_batch_dim else sample


@dataclass(frozen=True)
class GraphOfLoss:
    """This class holds a captured loss for one call.

    Attributes:
        captured: The graph, and its inputs other than parameters and sample.
        has_aux: Whether the loss returns auxiliary values.
        capture: Number of the capture; each capture counts its graphs from zero.
        device: Device of the parameters.
    """

    captured: CapturedLoss
    has_aux: bool | None
    capture: int
    device: torch.device

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that the loss reads besides parameters and sample: of buffers, closures and floats."""
        constants = self.captured.constants
        return [
            value
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64, device=self.device)
            for index, value in enumerate(constants)
            if self._is_tensor(index)
        ]

    @property
    def are_resident(self) -> list[bool]:
        """Return for each of ``tensors`` whether it is the same object at each call, unlike the tensor of a float."""
        constants = enumerate(self.captured.constants)
        return [isinstance(value, Tensor) for index, value in constants if self._is_tensor(index)]

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that two calls share exactly if they use the same graph and the same Python numbers."""
        constants = self.captured.constants
        numbers = [v for index, v in enumerate(constants) if not self._is_tensor(index)]
        return (self.capture, self.captured.number, *numbers)

    def _is_tensor(self, index: int) -> bool:
        """Return whether a constant is a tensor, or a float that the graph accepts as a tensor."""
        return index in self.captured.lifted or isinstance(self.captured.constants[index], Tensor)

    def loss(self, tensors: Sequence[Tensor] | None = None) -> Loss:
        """Return the graph as a loss.

        Args:
            tensors: Tensors to read instead of ``self.tensors``.
        """
        captured = self.captured
        constants = list(captured.constants)
        if tensors is not None:
            given = iter(tensors)
            constants = [
                next(given) if self._is_tensor(index) else value
                for index, value in enumerate(constants)
            ]

        def loss(leaves: Sequence[Tensor], sample: Sequence[Any]) -> Any:
            value, aux = captured(leaves, sample, constants)
            return (value, aux) if self.has_aux or aux is not None else value

        return loss
