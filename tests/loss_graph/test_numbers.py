"""Test that floats that change at every step are inputs of one graph, captured and compiled."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipgrad.loss_graph import LossCapture
from tests.compiled.conftest import Graphs, graphs  # noqa: F401
from tests.dp_tools import clipped, data, mlp, private, squared
from tests.loss_graph.conftest import Small, assert_exact, one_sample, small_loss
from tests.loss_graph.test_capture import batch
from tests.loss_graph.test_lifted import OldStyle
from tests.nightly import every, picked


class Annealed:
    """This class holds two floats that a loop changes."""

    beta = 0.5
    temperature = 1.5


NOW = Annealed()

USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "factor of a term": lambda m, x: squared(m, x) + NOW.beta * m(x).sin().sum(),
    "the rest of one": lambda m, x: (1 - NOW.beta) * squared(m, x) + (2 * NOW.beta + NOW.temperature) * m(x).sum(),
    "temperature": lambda m, x: F.log_softmax(m(x) / NOW.temperature, -1)[:, 0].sum(),
    "exponent": lambda m, x: m(x).square().sum() ** NOW.temperature,
    "methods": lambda m, x: m(x).mul(NOW.beta).sub(NOW.temperature).div(NOW.beta).square().sum().pow(NOW.beta),
    "of a parameter": lambda m, x: F.linear(x, NOW.beta * m[0].weight).square().sum() + squared(m, x),
    "penalty": lambda m, x: squared(m, x) + NOW.beta * m[0].weight.square().sum(),
    "integers": lambda m, x: squared(m, x) * (NOW.beta * torch.arange(2)).sum(),
    "in a checkpoint": lambda m, x: checkpoint(lambda h: squared(m, h) * NOW.beta, x, use_reentrant=False),
    "base": lambda m, x: (NOW.temperature ** m(x)).sum() + (NOW.beta - m(x)).square().sum(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("use", "compile"),
    picked(
        itertools.product(USES, [False, True]),
        {"factor of a term-False", "of a parameter-False", "methods-True"},
    ),
)
def test_one_graph_serves_all_values(use: str, compile: bool, graphs: Graphs) -> None:  # noqa: F811
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return USES[use](m, OldStyle.apply(x) if not compile else x)  # type: ignore[no-untyped-call]

    model = mlp()
    optimizer = private(model, loss, compile=compile)
    try:
        for step in range(10):  # PyTorch keeps eight graphs
            NOW.beta, NOW.temperature = 0.1 + 0.05 * step, 1.5 - 0.05 * step
            optimizer.backward(data())
            expected = clipped(model, data(), loss=loss)[0]
            torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=0, atol=1e-9)
            optimizer.zero_grad()
    finally:
        NOW.beta, NOW.temperature = 0.5, 1.5
    # PyTorch takes the first values for constants, and PyTorch 2.11 also the second value of a second number.
    of_a_compiled_step = 2 if torch.__version__ >= (2, 12) else 3  # type: ignore[operator]
    assert len(graphs) == (of_a_compiled_step if compile else 0)
    assert len(optimizer._clipper._loss_history.graphs._capture._graphs) <= 3  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_does_not_widen(dtype: torch.dtype) -> None:
    model, one = Small().to(dtype), one_sample().to(dtype)
    model.held = model.held.to(dtype)
    capture = LossCapture(lambda m, x: small_loss(m, x) * NOW.beta)
    try:
        for NOW.beta in (0.3, 0.4):
            graph = capture.graph((model, one), list(model.parameters()), [one])
        expected = small_loss(model, one) * NOW.beta
        assert graph.lifted
        for number in (0.4, torch.tensor(0.4, dtype=torch.float64)):
            constants = [number if i in graph.lifted else v for i, v in enumerate(graph.constants)]
            value, _ = graph(list(model.parameters()), [one], constants)
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
    finally:
        NOW.beta = 0.5


def test_a_probability_has_a_graph_for_each_value() -> None:
    """PyTorch's dropout branches on the probability, so a tensor cannot replace the float."""
    model, one = Small(), one_sample()
    capture = LossCapture(small_loss)
    for step in range(3):
        model.drop.p = 0.1 + 0.1 * step
        graph = capture.graph((model, one), list(model.parameters()), [one])
        assert not graph.lifted
        torch.manual_seed(0)
        value, _ = graph(list(model.parameters()), [one], graph.constants)
        torch.manual_seed(0)
        torch.testing.assert_close(value, small_loss(model, one), rtol=0, atol=1e-12)


def test_threads_capture_one_after_the_other() -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        try:
            model, one, capture = Small(), one_sample(), LossCapture(small_loss)
            barrier.wait()
            for step in range(3):
                model.drop.p = 0.0 if step % 2 else 1e-300
                graph = capture.graph((model, one), list(model.parameters()), [one])
            assert_exact(graph, model.eval(), small_loss, batch())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("compile", every(2, [False, True]))
def test_pytorchs_graphs_are_dropped_between_two_batches(compile: bool, graphs: Graphs) -> None:  # noqa: F811
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return squared(m, OldStyle.apply(x)) * NOW.beta  # type: ignore[no-any-return, no-untyped-call]

    model = mlp()
    optimizer = private(model, loss, compile=compile)
    try:
        for NOW.beta in (0.5, 0.6, 0.7, 0.8):
            optimizer.backward(data())
            expected = clipped(model, data(), loss=loss)[0]
            torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=0, atol=1e-9)
            optimizer.zero_grad()
            torch._dynamo.reset()
    finally:
        NOW.beta = 0.5
