"""Convolutions laid out channels last: the loss gets what it would have got, and cannot tell."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer, NotPerSampleError, _channels_last, _microbatch, clipped_grad
from clipgrad._channels_last import ChannelsLast
from tests.architectures import ARCHITECTURES, Architecture
from tests.dp_tools import trained
from tests.oracle import clipped_sum, per_sample_gradients
from tests.test_architectures import (
    EXACT,
    REFUSED,
    named,
    optimizer_for,
)
from tests.test_architectures import (
    test_equals_the_loop as equals_the_loop,
)
from tests.test_architectures import (
    test_refused_with_a_reason_and_no_trace as refused_with_a_reason,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
SIZE = 5


@pytest.fixture
def eager_to_turn(monkeypatch: pytest.MonkeyPatch) -> list[ChannelsLast]:
    """Every convolution, of float64 too, whatever it costs; each forward pass that tried."""
    tried: list[ChannelsLast] = []

    class Noted(ChannelsLast):
        def __init__(self) -> None:
            super().__init__()
            tried.append(self)

    monkeypatch.setattr(_channels_last, "DTYPES", {torch.float32, torch.float64})
    monkeypatch.setattr(_channels_last, "WORTH", 0.0)
    monkeypatch.setattr(_channels_last, "LARGE", 0)
    monkeypatch.setattr(_microbatch, "ChannelsLast", Noted)
    return tried


def convolves(architecture: Architecture) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in architecture.make().modules())


def with_convolutions(architectures: list[Architecture]) -> list[Any]:
    return named([a for a in architectures if convolves(a)])


# ------------------------------------------------------------------------------ hostile models


@pytest.mark.parametrize("architecture", with_convolutions(EXACT))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_every_architecture(architecture: Architecture, eager_to_turn: list[ChannelsLast]) -> None:
    equals_the_loop(architecture)
    assert eager_to_turn or architecture.may_refuse


@pytest.mark.parametrize("architecture", with_convolutions(REFUSED))
def test_what_is_refused_stays_refused(
    architecture: Architecture, eager_to_turn: list[ChannelsLast]
) -> None:
    refused_with_a_reason(architecture, None)


def test_most_architectures_do_turn(eager_to_turn: list[ChannelsLast]) -> None:
    """Else the tests above say nothing."""
    used = set()
    for name, architecture in ARCHITECTURES.items():
        if architecture in EXACT and convolves(architecture):
            model, batch = architecture.build(SIZE)
            del eager_to_turn[:]
            with contextlib.suppress(NotPerSampleError):
                optimizer_for(model, architecture).backward(*batch)
            if any(layout.used for layout in eager_to_turn):
                used.add(name)
    assert len(used) > 10, used


# ------------------------------------------------------------------- losses that look, or write


class Net(nn.Module):
    """A convolution, whatever a test does to its result, pooling, and a linear layer."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Linear(6 * 4 * 4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(F.relu(self.first(x)))
        y = F.max_pool2d(F.relu(self.second(y)), 2)
        result: Tensor = self.out(y.flatten(1))
        return result


def views(y: Tensor) -> Tensor:
    rows = y.view(y.shape[0], -1)
    assert y.is_contiguous()
    return (rows * 2).view(y.shape) + y.view(y.shape).mul(0.5)


def strides(y: Tensor) -> Tensor:
    height, width = y.shape[2:]
    transposed = y.as_strided(y.shape, (y.stride(0), height * width, 1, width))
    return y + transposed.sin()


def written_by_view(y: Tensor) -> Tensor:
    y = y * 1.5
    y.view(y.shape[0], -1).mul_(3.0)
    return y


def written_by_slice(y: Tensor) -> Tensor:
    y = y * 1.5
    y[:, 1] = 0.25
    return y


def view_of_before_is_written(y: Tensor) -> Tensor:
    y = y * 1.5
    rows = y.view(y.shape[0], -1)
    y.mul_(3.0)
    return y + rows.view(y.shape)


def below_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        level = y.reshape(y.shape[0], -1).mean()
    return y * level + y.reshape(y.shape)


def inside_a_transform(y: Tensor) -> Tensor:
    doubled: Tensor = torch.func.vmap(lambda one: one.as_strided((16,), (2,)).sum() * one)(y[0])
    return doubled[None]


def in_lists(y: Tensor) -> Tensor:
    low, high = torch.cat([y, y.cos()], 1).split(6, 1)
    return torch.stack([low, high]).sum(0)


def twice(y: Tensor) -> Tensor:
    mean: Tensor = y.mean((2, 3), keepdim=True)
    return F.avg_pool2d(y - mean, 3, stride=1, padding=1) + y.flatten(2).softmax(-1).view(y.shape)


MINDS = {
    "written_by_view",
    "written_by_slice",
    "view_of_before_is_written",
    "inside_a_transform",
}
BETWEEN = [
    views, strides, written_by_view, written_by_slice, view_of_before_is_written, below_no_grad,
    inside_a_transform, in_lists, twice,
]  # fmt: skip


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loop(
    between: Callable[[Tensor], Tensor], dtype: torch.dtype, eager_to_turn: list[ChannelsLast]
) -> None:
    torch.manual_seed(0)
    model = Net(between).to(dtype)
    batch = torch.randn(SIZE, 2, 8, 8, dtype=dtype), torch.randint(3, (SIZE,))
    per_sample = per_sample_gradients(model, cross_entropy, batch)
    sums, norms = clipped_sum(per_sample, 0.7)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model,
        cross_entropy,
        max_grad_norm=0.7,
        noise_multiplier=0.0,
        expected_batch_size=1,
    )
    tolerance = 1e-4 if dtype is torch.float32 else 1e-10
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(*batch)
        torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms, rtol=tolerance, atol=0)
        for name, parameter in trained(model).items():
            torch.testing.assert_close(parameter.grad, sums[name], rtol=0, atol=tolerance * 0.7)
    # One that minds is run again without, and is not tried any more.
    assert eager_to_turn[0].used
    assert len(eager_to_turn) == (1 if between.__name__ in MINDS else 2)


def test_the_losss_own_mistake_is_what_is_told(eager_to_turn: list[ChannelsLast]) -> None:
    calls = []

    def mistaken(y: Tensor) -> Tensor:
        calls.append(1)
        raise KeyError(f"call {len(calls)}")

    model = Net(mistaken)
    gradient = clipped_grad(
        lambda p, x, y: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y),
        max_grad_norm=1.0,
    )
    batch = torch.randn(SIZE, 2, 8, 8), torch.randint(3, (SIZE,))
    with pytest.raises(KeyError, match="call 2"):
        gradient(dict(model.named_parameters()), *batch)
    with pytest.raises(KeyError, match="call 4"):  # it is the loss's fault, not the layout's
        gradient(dict(model.named_parameters()), *batch)


def test_kept_values_are_still_refused(eager_to_turn: list[ChannelsLast]) -> None:
    kept: list[Tensor] = []

    def keeps(y: Tensor) -> Tensor:
        kept.append(y)
        return y + kept[0]

    model = Net(keeps)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model,
        cross_entropy,
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=1,
    )
    batch = torch.randn(SIZE, 2, 8, 8), torch.randint(3, (SIZE,))
    optimizer.backward(*batch)
    with pytest.raises(NotPerSampleError, match="kept from an earlier"):
        optimizer.backward(*batch)


# ----------------------------------------------------------------------------- where it is tried


def gradient_of(model: nn.Module, **options: Any) -> Callable[..., Any]:
    transform = clipped_grad(
        lambda p, x: torch.func.functional_call(model, p, (x,)).square().mean(),
        max_grad_norm=1.0,
        **options,
    )
    return lambda x: transform(dict(model.named_parameters()), x)


def layouts_seen(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[bool]:
    """For each result of a convolution, whether it was channels last."""
    seen = []
    real = torch.conv2d

    def conv2d(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = real(*args, **kwargs)
        seen.append(not result.is_contiguous())
        return result

    with monkeypatch.context() as patch:
        patch.setattr("clipgrad.rules._geometry.torch.conv2d", conv2d)
        gradient_of(model, **options)(x)
    return seen


def test_from_the_first_convolution_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it costs little: of images with few channels, in float32; not in exact arithmetic, nor in autocast."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    assert layouts_seen(model, torch.randn(4, 3, 12, 12), monkeypatch) == [False, False]
    x = torch.randn(32, 3, 20, 20)
    assert layouts_seen(model, x, monkeypatch) == [True, True]
    assert layouts_seen(model, x, monkeypatch, keep_batch_dim=False) == [True, True]
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2))
    assert layouts_seen(wide, x, monkeypatch) == [False, False]
    assert not any(layouts_seen(model, x, monkeypatch, grid=2.0**-20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not any(layouts_seen(model, x, monkeypatch))
    assert not any(layouts_seen(model.double(), x.double(), monkeypatch))


def test_nothing_is_kept_alive(eager_to_turn: list[ChannelsLast]) -> None:
    model = Net(views)
    batch = torch.randn(SIZE, 2, 8, 8), torch.randint(3, (SIZE,))
    gradient = clipped_grad(
        lambda p, x, y: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y),
        max_grad_norm=1.0,
    )
    gradient(dict(model.named_parameters()), *batch)
    kept = [weakref.ref(layout) for layout in eager_to_turn]
    del eager_to_turn[:]
    gc.collect()
    assert kept
    assert not any(reference() for reference in kept)


def test_data_is_refused_as_ever(eager_to_turn: list[ChannelsLast]) -> None:
    model = Net(lambda y: y + y.data)
    optimizer = optimizer_for(model, ARCHITECTURES["conv2d"])
    with pytest.raises(NotPerSampleError, match=r"\.data"):
        optimizer.backward(torch.randn(SIZE, 2, 8, 8))
