"""``torch.compile`` of a model or loss changes nothing: its code is captured, and never compiled together with ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad.errors import NotPerSampleError
from tests.dp_tools import clipped, data, mlp, private, squared
from tests.nightly import chosen

COMPILED: list[Any] = []


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    COMPILED.append(graph)
    return graph.forward


def compiled(function: Any) -> Any:
    return torch.compile(function, backend=backend)


def _layer(model: nn.Sequential) -> nn.Module:
    model[0] = compiled(model[0])
    return model


def _forward(model: nn.Sequential) -> nn.Module:
    model[1].forward = compiled(model[1].forward)
    return model


def _in_place(model: nn.Sequential) -> nn.Module:
    model[2].compile(backend=backend)
    return model


MODELS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "the model": compiled,
    "a layer": _layer,
    "a forward": _forward,
    "a layer in place": _in_place,
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    COMPILED.clear()
    torch.compiler.reset()


@pytest.mark.parametrize("name", chosen(MODELS, {"the model", "a layer in place"}))
def test_a_compiled_model_equals_the_loop(name: str) -> None:
    model = MODELS[name](mlp())
    first = private(model)
    for optimizer in (first, copy.copy(first)):  # a copy finds out anew
        optimizer.backward(data())
        expected = clipped(mlp(), data())[0].values()
        for found, wanted in zip(optimizer.clipped_sums.values(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert not COMPILED


def test_a_compiled_loss_equals_the_loop() -> None:
    model = mlp()
    optimizer = private(model, compiled(squared))
    optimizer.backward(data())
    torch.testing.assert_close(optimizer.clipped_sums, clipped(model, data())[0], rtol=0, atol=1e-9)
    assert not COMPILED


def test_what_is_switched_off_is_no_compiled_code() -> None:
    model = mlp()
    model[0].forward = torch.compiler.disable(model[0].forward)
    private(model).backward(data())


def test_compiled_code_that_cannot_be_captured() -> None:
    def branches(model: nn.Module, x: Tensor) -> Tensor:
        return squared(model, x) if x.sum() > 0 else model(x).sum()

    with pytest.raises(NotPerSampleError, match=r"uncompiled.*compile=True.*branching"):
        private(mlp(), compiled(branches)).backward(data())
    assert not COMPILED
