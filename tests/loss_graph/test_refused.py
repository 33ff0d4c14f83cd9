"""A loss that cannot be captured, or would be wrong, is refused in one sentence with the user's line."""

from __future__ import annotations

import contextvars
import copy
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from clipgrad.errors import CompileError, NotPerSampleError
from clipgrad.loss_graph import CannotCapture, LossCapture
from clipgrad.loss_graph.side_effects import refuse_writes
from tests.loss_graph.conftest import Small, one_sample, small_loss

CURRENT: contextvars.ContextVar[float] = contextvars.ContextVar("CURRENT", default=1.0)
STORED, WRITTEN = "stores a tensor", "writes in place to a tensor that it was given"
DATA = "reads the value of a tensor, or makes one whose shape depends on the data"
REFUSED: dict[str, tuple[Any, str]] = {
    "attribute": (lambda m, x, h: setattr(m, "kept", h), STORED),
    "attribute of a detached tensor": (lambda m, x, h: setattr(m, "kept", h.detach()), STORED),
    "the sample itself": (lambda m, x, h: setattr(m, "kept", x), STORED),
    "entry of a dictionary": (lambda m, x, h: m.table.update(kept=h), STORED),
    "end of a list": (lambda m, x, h: m.entries.append(h), STORED),
    "pair in a list": (lambda m, x, h: m.entries.append((1, {"kept": h})), STORED),
    "buffer replaced": (lambda m, x, h: setattr(m, "scale", h.mean()), STORED),
    "buffer written": (lambda m, x, h: (m.scale.mul_(0.9), None)[1], WRITTEN),
    "data of a buffer": (lambda m, x, h: (m.scale.data.mul_(0.9), None)[1], WRITTEN),
    "detached alias": (lambda m, x, h: (m.scale.detach().mul_(0.9), None)[1], WRITTEN),
    "view of the sample": (lambda m, x, h: (x[:, :2].mul_(2.0), None)[1], WRITTEN),
    "out=": (lambda m, x, h: (torch.mul(m.scale, 2.0, out=m.scale), None)[1], WRITTEN),
    "batch normalisation": (
        lambda m, x, h: nn.functional.batch_norm(h.repeat(2, 1), m.mean, m.var, training=True)[:1], WRITTEN,
    ),
    "branch": (lambda m, x, h: h * 2 if h.sum() > 0 else h, "[Dd]ata-dependent"),
    "item": (lambda m, x, h: h * h.sum().item(), DATA),
    "nonzero": (lambda m, x, h: h * h[h > 0].sum(), DATA),
    "numpy": (lambda m, x, h: h * float(h.detach().numpy().sum()), DATA),
    "deepcopy": (lambda m, x, h: copy.deepcopy(m.last)(h) @ m.last.weight, "deepcopy"),
    "Python's random numbers": (lambda m, x, h: h * random.random(), "random"),
    "context variable": (lambda m, x, h: h * CURRENT.get(), "ContextVar"),
    "the time": (lambda m, x, h: h * time.time(), "time"),
    "gradient inside": (lambda m, x, h: torch.func.grad(lambda v: v.square().sum())(h), "transform"),
    "autograd inside": (lambda m, x, h: torch.autograd.grad(h.square().sum(), h, create_graph=True)[0], "autograd"),
    "an error of the user's": (lambda m, x, h: h.nothing_of_that_name, "nothing_of_that_name|attribute"),
}  # fmt: skip
if torch.__version__ >= (2, 12):  # type: ignore[operator]
    # PyTorch 2.11 makes a custom function of a hook on an intermediate tensor, which runs per sample.
    REFUSED["hook on a tensor"] = (
        lambda m, x, h: (h.register_hook(lambda g: g * 2), None)[1],
        "register_hook",
    )


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_line(case: str) -> None:
    step, message = REFUSED[case]
    model, one = Small(step), one_sample()
    model.register_buffer("mean", torch.zeros(4).double())
    model.register_buffer("var", torch.ones(4).double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model)), dict(model.table), list(model.entries)
    with pytest.raises(CannotCapture, match=message) as found:
        LossCapture(small_loss).graph((model, one), list(model.parameters()), [one])
    text = str(found.value)
    assert re.search(rf"{re.escape(str(Path(__file__).parent))}/\w+\.py:\d+", text), text
    assert text.count("\n") == 0
    assert isinstance(found.value, CompileError)
    # Nothing was stored or written on the way.
    assert (set(vars(model)), dict(model.table), list(model.entries)) == attributes
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(one, one_sample(), rtol=0, atol=0)


def test_a_hook_is_refused_or_runs_per_sample() -> None:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        hidden = (x @ weight).tanh()
        hidden.register_hook(lambda g: g * g.abs().sum())
        return hidden.square().sum()

    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    first, *others = torch.randn(5, 4, dtype=torch.float64)
    try:
        graph = LossCapture(loss).graph((weight, first), [weight], [first])
    except CannotCapture:
        return
    each = vmap(grad(lambda w, x: graph([w], [x], graph.constants)[0]), (None, 0))
    expected = [torch.autograd.grad(loss(weight, x), weight)[0] for x in others]
    torch.testing.assert_close(each(weight, torch.stack(others)), torch.stack(expected))


def test_a_tensor_that_requires_grad_and_is_not_a_parameter() -> None:
    model, one = Small(), one_sample()
    with pytest.raises(NotPerSampleError, match=r"shape \(4, 3\) that requires grad"):
        LossCapture(small_loss).graph((model, one), list(model.parameters())[1:], [one])


def test_a_view_of_a_parameter_made_outside() -> None:
    model, one = Small(), one_sample()
    transposed = model.first.weight.t()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return small_loss(model, x) + (x @ transposed).sum()

    with pytest.raises(NotPerSampleError, match=r"shape \(3, 4\) that requires grad"):
        LossCapture(loss).graph((model, one), list(model.parameters()), [one])


def test_a_parameter_that_does_not_require_grad() -> None:
    weight, one = torch.ones(3), torch.ones(1, 3)
    with pytest.raises(ValueError, match="must require grad"):
        LossCapture(lambda w, x: (x @ w).sum()).graph((weight, one), [weight], [one])


@pytest.mark.parametrize("value", [lambda x: [x.sum()], lambda x: None, lambda x: (1.0, x.sum())])
def test_results_that_are_not_a_loss(value: Any) -> None:
    one = torch.ones(1, 3, requires_grad=True)
    with pytest.raises(CannotCapture, match=r"it returns|captured no operation"):
        LossCapture(value).graph((one,), [one], [])


@pytest.mark.nightly
def test_a_value_that_changes_each_time_is_named_in_an_error() -> None:
    """A factor would be an input of one graph; a probability is not."""
    model, one = Small(), one_sample()
    capture, params = LossCapture(small_loss), list(model.parameters())
    for step in range(16):
        model.drop.p = step / 100
        assert capture.graph((model, one), params, [one]).number == step
    model.drop.p = 0.9
    with pytest.raises(CannotCapture, match=r"16 graphs already.*p.* == "):
        capture.graph((model, one), params, [one])
    model.drop.p = 0.02  # which has its graph
    assert capture.graph((model, one), params, [one]).number == 2


def test_capture_is_refused_if_torch_compile_is_switched_off() -> None:
    model, one = Small(), one_sample()
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(CannotCapture, match="switched off"),
    ):
        LossCapture(small_loss).graph((model, one), list(model.parameters()), [one])


def test_the_search_for_writes_ties_a_graph_to_no_length() -> None:
    """It runs the graph on stand-ins, and PyTorch 2.11 took what it asked of a length there for a guard of the loss."""

    def asks(x: Tensor) -> Tensor:
        return x * 2.0 if x.shape[0] == 5 else x

    shapes = ShapeEnv()
    stand_in = FakeTensorMode(shape_env=shapes).from_tensor(
        torch.randn(5, 3),
        symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC]),
    )
    graph = torch.fx.Graph()
    place = graph.placeholder("x")
    place.meta["example_value"] = stand_in
    graph.output((graph.call_function(asks, (place,)),))
    refuse_writes(GraphModule(nn.Module(), graph))
    assert isinstance(stand_in.shape[0], torch.SymInt)
    assert not shapes.guards
    asks(stand_in)
    assert shapes.guards


@pytest.mark.parametrize("axes", [2, 3])
def test_one_graph_serves_all_lengths(axes: int) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    capture = LossCapture(lambda w, x: (x @ w).tanh().sum())
    for length in (5, 7, 9, 11, 13):
        x = torch.randn(*[1, length, 4][-axes:])
        capture.graph((weight, x), [weight], [x])
    assert len(capture._graphs) == 2
