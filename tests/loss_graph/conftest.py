"""This module has losses for the tests of the captured loss, and the definition that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import clipgrad
from clipgrad.loss_graph import CapturedLoss

TOLERANCE = 1e-9


class Small(nn.Module):
    """This model has two layers, a buffer, a number, and a step that a test may replace."""

    def __init__(self, step: Callable[[Small, Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.drop = nn.Dropout(0.0)
        self.last = nn.Linear(4, 3)
        self.scale: Tensor
        self.register_buffer("scale", torch.full((), 2.0))
        self.held = torch.full((), 1.5, dtype=torch.float64)  # a tensor, but no buffer
        self.table: dict[str, Any] = {}
        self.entries: list[Any] = []
        self.factor = 1.0
        self.step = step
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.first(x).tanh()) * self.scale * self.held * self.factor
        if self.step is not None:
            changed = self.step(self, x, hidden)
            hidden = hidden if changed is None else changed
        return self.last(hidden)


def small_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def one_sample() -> Tensor:
    return torch.ones(1, 3, dtype=torch.float64)


def clipped(graph: CapturedLoss, params: list[Tensor], *batch: Tensor) -> Any:
    """Compute the clipped sum through a captured graph."""

    def loss(values: dict[str, Tensor], *leaves: Tensor) -> Tensor:
        return graph([values[str(i)] for i in range(len(params))], leaves, graph.constants)[0]

    named = {str(i): p for i, p in enumerate(params)}
    return clipgrad.clipped_grad(loss, max_grad_norm=0.5)(named, *batch)


def assert_exact(graph: CapturedLoss, model: nn.Module, loss: Any, *batch: Tensor) -> None:
    """Check norms and sums of a graph against a loop that calls the loss itself."""
    params = [p for p in model.parameters() if p.requires_grad]
    result = clipped(graph, params, *batch)
    norms, sums = [], [torch.zeros_like(p) for p in params]
    for index in range(len(batch[0])):
        one = [leaf[index : index + 1] for leaf in batch]
        found = torch.autograd.grad(loss(model, *one), params, allow_unused=True)
        found = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)
        ]
        norm = torch.cat([g.flatten() for g in found]).norm()
        norms.append(norm)
        for total, gradient in zip(sums, found, strict=True):
            total += gradient * min(1.0, 0.5 / float(norm))
    assert len(set(map(float, norms))) > 1  # samples that all are alike would hide a mixing of them
    torch.testing.assert_close(result.grad_norms, torch.stack(norms), rtol=0, atol=TOLERANCE)
    for index, total in enumerate(sums):
        torch.testing.assert_close(result.grads[str(index)], total, rtol=0, atol=TOLERANCE)
