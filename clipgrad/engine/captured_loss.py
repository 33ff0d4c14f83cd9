"""The loss of one sample as PyTorch captured it, in the form in which the engine runs losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipgrad.engine.inputs import Inputs, Loss
from clipgrad.loss_graph import CapturedLoss, LossCapture


class LossGraphs:
    """The graphs of one loss; PyTorch's guards choose among them at each batch.

    Args:
        keep_batch_dim: Whether the loss sees a batch axis of one.
        has_aux: Whether it returns auxiliary values beside the loss.
    """

    def __init__(self, *, keep_batch_dim: bool, has_aux: bool) -> None:
        self._keep_batch_dim = keep_batch_dim
        self._has_aux = has_aux
        self._fn: Any = None
        self._capture: LossCapture | None = None
        self._captures = 0

    def forget(self) -> None:
        """Capture the loss anew at the next batch."""
        self._capture = None

    def of(self, inputs: Inputs) -> GraphOfLoss:
        """The graph that serves a batch.

        Args:
            inputs: The batch, of at least one sample.

        Raises:
            CannotCapture: If PyTorch cannot capture the loss.
            NotPerSampleError: If the loss uses a tensor that requires grad and is no parameter.
        """
        call = inputs.sample_call()
        if self._capture is None or call.fn is not self._fn:
            self._fn, self._capture = call.fn, LossCapture(call.fn)
            self._captures += 1
        first = 0 if not self._keep_batch_dim else slice(0, 1)
        sample = [leaf[first] if isinstance(leaf, Tensor) else leaf for leaf in inputs.batch]
        with call.context():
            captured = self._capture.graph(call.arguments(sample), call.parameters, sample)
        return GraphOfLoss(captured, self._has_aux, self._captures, inputs.params[0].device)


@dataclass(frozen=True)
class GraphOfLoss:
    """A captured loss for one call.

    Attributes:
        captured: The graph, and the tensors that it takes besides parameters and sample.
        has_aux: Whether the loss returns auxiliary values.
        capture: Number of the capture; each counts its graphs from zero.
        device: Of the parameters.
    """

    captured: CapturedLoss
    has_aux: bool
    capture: int
    device: torch.device

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What the loss reads besides parameters and sample: buffers, attributes, closures, numbers that change."""
        constants = self.captured.constants
        return [
            value
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64, device=self.device)
            for index, value in enumerate(constants)
            if self._is_tensor(index)
        ]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two calls exactly if the same graph serves both, with the same Python numbers."""
        constants = self.captured.constants
        numbers = [v for index, v in enumerate(constants) if not self._is_tensor(index)]
        return (self.capture, self.captured.number, *numbers)

    def _is_tensor(self, index: int) -> bool:
        """Whether a constant is a tensor, or a number that may be given as one."""
        return index in self.captured.lifted or isinstance(self.captured.constants[index], Tensor)

    def loss(self, tensors: Sequence[Tensor] | None = None) -> Loss:
        """The graph as a loss.

        Args:
            tensors: What to read in the place of ``self.tensors``.
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
