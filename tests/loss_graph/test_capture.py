"""The captured graph of a loss computes that loss for other parameters, samples and buffers too."""

from __future__ import annotations

import cProfile
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from clipgrad.loss_graph import LossCapture
from tests.loss_graph.conftest import Small, assert_exact, clipped, one_sample, small_loss
from tests.nightly import every

LOGGER = logging.getLogger("a library")


def batch(size: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(size, 3, dtype=torch.float64)


def autocast(model: Small, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return hidden + (x @ model.first.weight.T).double()


def without_grad(model: Small, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        scale = hidden.sum()
    return hidden * scale


class Scaled(torch.autograd.Function):
    """This function saves an argument, an output and an intermediate; its backward is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        between = (x @ weight).exp()
        result = between.sum(-1, keepdim=True) * factor
        ctx.save_for_backward(x, weight, between, result)
        ctx.factor = factor
        chosen = result > 0
        ctx.mark_non_differentiable(chosen)
        return result, chosen

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, between, result = ctx.saved_tensors
        inner = gradient * between * ctx.factor / gradient.norm() + result
        return 3 * inner @ weight.T, x.T @ inner, None


def custom_function(model: Small, x: Tensor, hidden: Tensor) -> Tensor:
    result, chosen = Scaled.apply(hidden, model.last.weight.T, 0.5)  # type: ignore[no-untyped-call]
    return hidden * torch.where(chosen, result, -result)


STEPS: dict[str, Any] = {
    "nothing": None,
    "a logger": lambda m, x, h: LOGGER.warning("of shape %s", h.shape),
    "print": lambda m, x, h: print(h.shape),
    "checkpoint": lambda m, x, h: checkpoint(lambda v: m.first(x).sin() * v, h, use_reentrant=False),
    "vmap": lambda m, x, h: torch.vmap(lambda v: v * v.sum())(h),
    "two levels of vmap": lambda m, x, h: torch.vmap(torch.vmap(torch.mul, (0, None)), (None, 0))(h[0], h[0]),
    "vmap in a checkpoint": lambda m, x, h: checkpoint(torch.vmap(torch.sin), h, use_reentrant=False),
    "custom function": custom_function,
    "autocast": autocast,
    "no grad": without_grad,
    "a weight twice": lambda m, x, h: h + F.linear(x, m.first.weight) @ m.first.weight @ m.first.weight.T,
    "a write to a temporary": lambda m, x, h: h.clone().mul_(2.0),
    "a list of its own": lambda m, x, h: sum([h, h * 2]),
    "a constant": lambda m, x, h: h * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=h.dtype),
}  # fmt: skip


@pytest.mark.parametrize("step", every(2, STEPS))
def test_graph_is_exact(step: str) -> None:
    model, one = Small(STEPS[step]), one_sample()
    graph = LossCapture(small_loss).graph((model, one), list(model.parameters()), [one])
    assert_exact(graph, model, small_loss, batch())


def test_parameters_in_an_argument() -> None:
    """Parameters are recognised by identity, and new parameters are inputs of the same graph."""
    model, one = Small(), one_sample()

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).square().sum()

    capture = LossCapture(loss)
    for scale in (1.0, 2.0):
        params = {
            name: (scale * p).detach().requires_grad_() for name, p in model.named_parameters()
        }
        graph = capture.graph((params, one), list(params.values()), [one])
        value, aux = graph(list(params.values()), [one], graph.constants)
        torch.testing.assert_close(value, loss(params, one), rtol=0, atol=1e-9)
        assert graph.number == 0
        assert aux is None


def test_frozen_and_tied_parameters() -> None:
    model, one = Small(), one_sample()
    model.first.bias.requires_grad_(False)
    model.last.weight = nn.Parameter(model.first.weight.detach().T.clone())
    tied = Small(lambda m, x, h: h + F.linear(x, m.other))
    tied.other = tied.first.weight  # type: ignore[assignment]
    for each in (model, tied):
        params = [p for p in each.parameters() if p.requires_grad]
        graph = LossCapture(small_loss).graph((each, one), params, [one])
        assert not any(getattr(value, "requires_grad", False) for value in graph.constants)
        assert_exact(graph, each, small_loss, batch())


def test_constants_have_their_present_values() -> None:
    model, one = Small(), one_sample()
    capture, params = LossCapture(small_loss), list(model.parameters())
    capture.graph((model, one), params, [one])
    model.scale.fill_(3.0)
    model.held = torch.full((), -1.0, dtype=torch.float64)
    graph = capture.graph((model, one), params, [one])
    assert graph.number == 0
    assert_exact(graph, model, small_loss, batch())


def test_aux_is_rebuilt() -> None:
    model, one = Small(), one_sample()

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = model(x)
        return logits.sum(), {"logits": logits, "x": x, "bias": [model.last.bias], "number": 3}

    params = list(model.parameters())
    graph = LossCapture(loss).graph((model, one), params, [one])
    other, bias = torch.randn(1, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    value, aux = graph([*params[:-1], bias], [other], graph.constants)
    assert aux["x"] is other
    assert aux["bias"][0] is bias
    assert aux["number"] == 3
    torch.testing.assert_close(aux["logits"].sum(), value)


def sequence_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    hidden = model(x)
    return hidden.sum() / x.shape[1] + (y * y.shape[1]).mean() * hidden.mean()


def test_one_graph_serves_later_lengths() -> None:
    model = Small()
    capture, numbers = LossCapture(sequence_loss), []
    for length in (3, 5, 7, 11, 6):
        x = torch.randn(4, length, 3, dtype=torch.float64)
        y = torch.randn(4, 2 * length, dtype=torch.float64)
        one = [x[:1].clone(), y[:1].clone()]
        graph = capture.graph((model, *one), list(model.parameters()), one)
        numbers.append(graph.number)
        assert not any(isinstance(value, int) for value in graph.constants)
        assert_exact(graph, model, sequence_loss, x, y)
    assert numbers == [0, 1, 1, 1, 1]


def test_dropout_differs_for_each_sample() -> None:
    model, one = Small(), one_sample()
    model.drop.p = 0.5
    params = list(model.parameters())
    graph = LossCapture(small_loss).graph((model, one), params, [one])
    torch.manual_seed(0)
    norms = clipped(graph, params, one.expand(64, 3).clone()).grad_norms
    assert len(norms.unique()) > 4


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    model, one = kind(3, 4, batch_first=True).double(), torch.randn(1, 5, 3, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[0].square().sum()

    graph = LossCapture(loss).graph((model, one), list(model.parameters()), [one])
    assert_exact(graph, model, loss, torch.randn(4, 5, 3, dtype=torch.float64))


def test_losses_with_shared_code_have_their_own_graphs() -> None:
    """Losses with one code object, as a factory makes them, do not share graphs or lengths.

    There are more of them than the eight graphs that PyTorch keeps for a code object.
    """
    captures = []
    for length in range(2, 12):
        model, one = Small(), torch.randn(1, length, 3, dtype=torch.float64)
        captures.append(LossCapture(small_loss))
        graph = captures[-1].graph((model, one), list(model.parameters()), [one])
        assert graph.number == 0
        assert not any(isinstance(value, torch.SymInt | int) for value in graph.constants)


def test_global_settings_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    config = torch._dynamo.config
    before = config.get_config_copy()
    model, one = Small(), one_sample()
    other = torch.compile(lambda x: x + 1, backend="eager")
    other(one)
    capture = LossCapture(small_loss)
    for number in (1.0, 2.0):
        model.factor = number
        capture.graph((model, one), list(model.parameters()), [one])
        assert config.get_config_copy() == before
    with torch.compiler.set_stance("fail_on_recompile"):
        other(one)  # it still has its graph


def test_under_a_profiler() -> None:
    model, one = Small(), one_sample()
    profile = cProfile.Profile()
    with profile:
        graph = LossCapture(small_loss).graph((model, one), list(model.parameters()), [one])
    assert_exact(graph, model, small_loss, batch())


def test_under_no_grad() -> None:
    model, one = Small(), one_sample()
    with torch.no_grad():
        graph = LossCapture(small_loss).graph((model, one), list(model.parameters()), [one])
    assert_exact(graph, model, small_loss, batch())


def test_an_error_leaves_no_region_open() -> None:
    def loss(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return torch.vmap(lambda v: v @ x.transpose(0, 1))(x).float().sum()

    one = torch.ones(1, 3)
    graph = LossCapture(lambda x, w: loss(x) * w.sum())
    weight = torch.ones(2, requires_grad=True)
    captured = graph.graph((one, weight), [weight], [one])
    for _ in range(2):
        with pytest.raises(RuntimeError):
            captured([weight], [torch.ones(1, 3, 7, 2)], captured.constants)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert torch._C._functorch.maybe_current_level() is None


def test_nothing_is_kept_alive() -> None:
    model, one = Small(), one_sample()
    capture = LossCapture(small_loss)
    graph = capture.graph((model, one), list(model.parameters()), [one])
    seen = weakref.ref(model), weakref.ref(one), weakref.ref(model.first.weight)
    del model, one, graph
    gc.collect()
    assert [reference() for reference in seen] == [None, None, None]


@pytest.mark.nightly
def test_graph_is_captured_again_after_its_model_was_deleted() -> None:
    capture = LossCapture(small_loss)
    for _ in range(3):
        model, one = Small(), one_sample()
        graph = capture.graph((model, one), list(model.parameters()), [one])
        assert_exact(graph, model, small_loss, batch())
        del model, graph
        gc.collect()
