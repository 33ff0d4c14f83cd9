"""A value that a loss stores at its first call must not reach other samples, captured or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad.errors import CompileError, NotPerSampleError
from tests.compiled.conftest import Graphs, graphs  # noqa: F401
from tests.dp_tools import private, values


class Holder(nn.Module):
    """This model has one layer and an attribute for stored values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def mean_of_the_first(model: Holder, x: Tensor) -> Tensor:
    if model.kept is None:
        model.kept = x.mean()
    return (model(x) * model.kept * 100).sum()


def writes_a_parameter(model: Holder, x: Tensor) -> Tensor:
    if model.kept is None:
        model.kept = torch.zeros(2)
        with torch.no_grad():
            model.layer.bias.copy_(x.detach().mean().view(1))
    return model(x).sum()


def with_a_question(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """This model also reads a value while it is not captured, so that the eager step captures the loss."""

    def asks(model: Holder, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            bool((x == 0).all())
        return loss(model, x)

    return asks


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("loss", [mean_of_the_first, writes_a_parameter])
def test_the_first_sample_does_not_escape(
    loss: Callable[..., Tensor],
    compile: bool,
    graphs: Graphs,  # noqa: F811
) -> None:
    torch.manual_seed(0)
    model = Holder()
    before = values(model)
    optimizer = private(model, loss if compile else with_a_question(loss), compile=compile)
    with pytest.raises((NotPerSampleError, CompileError)):
        optimizer.backward(torch.ones(5, 4))
    for name, value in values(model).items():
        assert torch.equal(value, before[name])
