"""What a workload is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model with its loss and synthetic batches; the optimizer is the mode's affair.

    Attributes:
        name: As in the tables and in ``-k``.
        description: What is measured, in a few words, for the head of a table.
        model: Makes the model, its weights from PyTorch's global generator.
        batch: From a batch size to the arguments of the loss, likewise.
        loss: ``loss(model, *batch)``, the mean over the batch.
        batch_sizes: Batch sizes that are measured on a device type, ``"cpu"`` or ``"cuda"``.
        sweep: Further batch sizes, for the chart of overhead against batch size.
    """

    name: str
    description: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    batch_sizes: dict[str, tuple[int, ...]]
    sweep: dict[str, tuple[int, ...]] = field(default_factory=dict)
