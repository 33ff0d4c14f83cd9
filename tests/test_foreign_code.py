"""Hooks, modes, subclasses and functions of the user's: they see one sample, or are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.bias import causal_lower_right
from torch.utils.flop_counter import FlopCounterMode

from clipgrad import clipped_grad
from clipgrad.engine.foreign_code import without_saved_tensors_hooks
from clipgrad.errors import CompileError, NotPerSampleError
from tests.compiled.conftest import Graphs, graphs  # noqa: F401
from tests.dp_tools import data, mlp, private, squared
from tests.foreign_code import HOSTILE, SAVED, Hostile, Params, plain, quantised

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*non-full backward hook"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
SAMPLES = 24


def parameters() -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (6, 4), "v": (2, 6)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def batch(*, replaced: bool = False) -> Tensor:
    """Two batches that differ in one sample, which is ten thousand times as large."""
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if replaced:
        x[0] *= 1e4
    return x


def clipped_sum(hostile: Hostile, x: Tensor, **options: Any) -> Tensor:
    params, x = hostile.wrap(parameters(), x)
    gradient = clipped_grad(hostile.loss, max_grad_norm=1.0, **options)
    with hostile.around():
        result = gradient(params, x)
    return torch.cat([total.flatten() for total in result.grads.values()])


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile(name: str) -> None:
    hostile = HOSTILE[name]
    if hostile.message is not None:
        with pytest.raises(NotPerSampleError, match=hostile.message) as caught:
            clipped_sum(hostile, batch())
        assert len(str(caught.value)) < 420
    else:
        moved = clipped_sum(hostile, batch()) - clipped_sum(hostile, batch(replaced=True))
        assert 0 < float(moved.norm()) <= 2 * (1 + 1e-9)
    clipped_sum(Hostile(plain, None), batch())  # nothing is left of a refusal
    with torch.autograd.graph.save_on_cpu():
        pass


@pytest.mark.parametrize(
    "name",
    [
        "saved tensors hooks inside",
        "saved tensors hooks around",
        "dispatch mode inside",
        "node hook",
        "module full backward hook",
        "constant Dispatched, mul",
        "batch Functions",
    ],
)
def test_hostile_in_a_compiled_step(name: str) -> None:
    hostile = HOSTILE[name]
    with pytest.raises(NotPerSampleError, match=hostile.message):
        clipped_sum(hostile, batch(), compile=True)


AROUND = ["saved tensors hooks", "save_on_cpu", "dispatch mode", "function mode"]


@pytest.mark.parametrize("name", AROUND)
def test_what_is_put_around_a_step_that_is_compiled_already(name: str, graphs: Graphs) -> None:  # noqa: F811
    refused_around_a_compiled_step(name)
    assert len(graphs) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", AROUND)
def test_what_is_put_around_a_step_of_torch_inductor(name: str) -> None:
    refused_around_a_compiled_step(name)


def refused_around_a_compiled_step(name: str) -> None:
    gradient = clipped_grad(plain, max_grad_norm=1.0, compile=True)
    gradient(parameters(), batch())
    message = rf"{SAVED}|Mode is active, which sees single operations"
    with (
        HOSTILE[f"{name} around"].around(),
        pytest.raises((NotPerSampleError, CompileError), match=message),
    ):
        gradient(parameters(), batch())
    gradient(parameters(), batch())


def test_the_attack_works_where_nobody_refuses_it() -> None:
    """Else the tests above would prove nothing: the same pack function on gradients of whole batches."""

    def moved(pack: Callable[[Tensor], Tensor]) -> float:
        sums = []
        for replaced in (False, True):
            weight = parameters()["w"].requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                # The first sample itself is left out: what moves is what it does to the others.
                loss = F.linear(batch(replaced=replaced), weight).square()[1:].sum()
            sums.append(torch.autograd.grad(loss, [weight])[0])
        return float((sums[0] - sums[1]).norm())

    assert moved(lambda t: t) == 0
    assert moved(quantised) > 2


def test_hooks_around_the_backward_of_an_optimizer() -> None:
    model = mlp()
    optimizer = private(model)
    with torch.autograd.graph.save_on_cpu(), pytest.raises(NotPerSampleError, match="save_on_cpu"):
        optimizer.backward(data())
    optimizer.backward(data())


PYTORCHS_OWN: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "flop counter": lambda: FlopCounterMode(display=False),
    "device": lambda: torch.device("cpu"),
    "hooks disabled": without_saved_tensors_hooks,
    "profiler": lambda: torch.autograd.profiler.profile(),
    "nothing": contextlib.nullcontext,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", list(PYTORCHS_OWN))
def test_pytorchs_own_modes_go_on_working(name: str, inside: bool) -> None:
    context = PYTORCHS_OWN[name]

    def loss(p: Params, x: Tensor) -> Tensor:
        with context():
            return plain(p, x)

    expected = clipped_sum(Hostile(plain, None), batch())
    hostile = Hostile(loss, None) if inside else Hostile(plain, None, context)
    torch.testing.assert_close(clipped_sum(hostile, batch()), expected, rtol=1e-12, atol=1e-12)


def test_a_flop_counter_sees_the_step() -> None:
    with FlopCounterMode(display=False) as counter:
        clipped_sum(Hostile(plain, None), batch())
    assert counter.get_total_flops() > 0


def test_transforms_checkpoints_and_traces_of_pytorch_meet_disabled_hooks() -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda z: plain(p, z))(x)
        traced = make_fx(lambda z: z * 2)(x.new_ones(2))
        return plain(p, inner) + traced(x).sum() * 0

    assert clipped_sum(Hostile(loss, None), batch()).isfinite().all()


def test_fake_tensors() -> None:
    with FakeTensorMode():
        params = {"w": torch.empty(6, 4), "v": torch.empty(2, 6)}
        gradient = clipped_grad(plain, max_grad_norm=1.0, nan_safe=False)
        result = gradient(params, torch.empty(3, 4))
        assert result.grads["w"].shape == (6, 4)


def test_pytorchs_own_subclasses() -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        q = F.linear(x, p["w"])[:, None]
        bias = causal_lower_right(1, 1)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).square().sum()

    sums = clipped_grad(loss, max_grad_norm=1.0)({"w": parameters()["w"]}, batch()).grads
    without = clipped_grad(lambda p, x: F.linear(x, p["w"]).square().sum(), max_grad_norm=1.0)
    torch.testing.assert_close(sums, without({"w": parameters()["w"]}, batch()).grads)


def test_grad_fn_may_be_compared_with_none() -> None:
    seen = []

    def loss(p: Params, x: Tensor) -> Tensor:
        hidden = F.linear(x, p["w"])
        seen.extend([hidden.grad_fn is not None, x.grad_fn is None, p["w"].grad_fn is None])
        return hidden.square().sum()

    clipped_grad(loss, max_grad_norm=1.0)({"w": parameters()["w"]}, batch())
    assert all(seen)
    assert squared(mlp(), data()).grad_fn is not None
